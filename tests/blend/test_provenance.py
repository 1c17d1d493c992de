"""The text chunk of a picture."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qrlora.blend import AdapterUse, Provenance, read_provenance
from qrlora.blend.provenance import SheetProvenance, file_hash, relative_to_picture, save_picture
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank, write_adapter

STORY = Provenance(
    prompt='a "<c>" dög\nin <s> style',
    seed=2**40,
    model=None,
    model_hash="00",
    adapters=(AdapterUse(file="../a.safetensors", sha256="ff", weight=-0.1),),
    settings={"height": 64, "true_cfg_scale": 2.5, "negative_prompt": ""},
    device="cpu",
    dtype="float32",
)


def test_provenance_survives_the_file(tmp_path: Path) -> None:
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / "new" / "a.png", STORY)
    assert read_provenance(path) == STORY


def test_hash_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(QrloraError, match="no such adapter"):
        file_hash(tmp_path / "b")


def test_hash_of_a_peft_folder_covers_its_settings(tmp_path: Path) -> None:
    folder, pair = tmp_path / "peft", LowRank(torch.ones(4, 2), torch.ones(2, 4))
    write_adapter(Adapter({"transformer_blocks.0.attn.to_q": pair}), folder, "peft")
    before = file_hash(folder)
    assert file_hash(folder) == before
    settings = folder / "adapter_config.json"
    settings.write_text(settings.read_text() + " ")
    assert file_hash(folder) != before


def test_quantisation_is_written_where_there_is_one(tmp_path: Path) -> None:
    assert "quantization" not in STORY.model_dump_json()
    told = STORY.model_copy(update={"quantization": "nf4"})
    assert read_provenance(save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", told)) == told


def test_adapters_are_named_from_the_picture(tmp_path: Path) -> None:
    assert relative_to_picture(tmp_path / "a.safetensors", tmp_path / "pictures" / "x.png") == "../a.safetensors"


def _plain(path: Path, **texts: str) -> None:
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({}, "no 'qrlora' text chunk"),
        ({"qrlora": "{"}, "damaged"),
        ({"qrlora": "[]"}, "damaged"),
        ({"qrlora": '{"prompt": 3}'}, "damaged"),
    ],
)
def test_pictures_that_cannot_be_repeated_are_told(tmp_path: Path, texts: dict[str, str], words: str) -> None:
    _plain(tmp_path / "a.png", **texts)
    with pytest.raises(QrloraError, match=words):
        read_provenance(tmp_path / "a.png")


def test_other_files_and_sheets_are_told(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(QrloraError, match="not a readable picture"):
        read_provenance(tmp_path / "text.png")
    with pytest.raises(QrloraError, match="no such picture"):
        read_provenance(tmp_path / "nowhere.png")
    sheet = SheetProvenance(prompt="", seed=0, model=None, model_hash="", settings={}, pictures=("pictures/a.png",))
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "sheet.png", sheet)
    with pytest.raises(QrloraError, match="sheet of many pictures"):
        read_provenance(tmp_path / "sheet.png")


def test_pictures_too_large_damaged_or_of_another_format_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_picture(Image.new("RGB", (64, 64)), tmp_path / "a.png", STORY)
    monkeypatch.setattr("qrlora.blend.provenance._MAX_PIXELS", 64)
    with pytest.raises(QrloraError, match="too many"):
        read_provenance(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(QrloraError, match="not a readable picture"):
        read_provenance(path)
    Image.new("RGB", (4, 4)).save(path, format="BMP")
    with pytest.raises(QrloraError, match="not a readable picture"):
        read_provenance(path)
