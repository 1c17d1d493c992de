"""Pictures and captions through the datasets library, offline, from local folders."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qrlora.data import dataset_sources
from qrlora.errors import QrloraError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def _picture(shade: int, size: tuple[int, int] = (20, 30), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(stream, "PNG", **options)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with captions, as `datasets` reads a folder of pictures."""
    path = tmp_path / "pets"
    path.mkdir()
    lines: list[dict[str, Any]] = []
    for row, caption in enumerate(["a <c>\n cat", "", None]):
        (path / f"{row}.png").write_bytes(_picture(row * 50))
        lines.append({"file_name": f"{row}.png", "text": caption, "age": row})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def _shade(source: Any) -> int:
    return int(np.asarray(source.read().rgb)[0, 0, 0])


def test_a_folder_of_pictures(folder: Path) -> None:
    sources = dataset_sources(str(folder), "a <c> dog", caption_column="text")
    assert [source.caption for source in sources] == ["a <c> cat", "a <c> dog", "a <c> dog"]
    assert [source.name for source in sources] == [f"row {row} of {folder}" for row in range(3)]
    assert [_shade(source) for source in sources] == [0, 50, 100]
    plain = dataset_sources(str(folder), "a <c> dog")
    assert {source.caption for source in plain} == {"a <c> dog"}


@pytest.mark.parametrize("kind", ["image", "binary"])
def test_parquet_with_pictures_inside(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tables"
    path.mkdir()
    columns = {"picture": [_picture(0), _picture(80)], "says": ["one", "two"]}
    value = datasets.Image() if kind == "image" else datasets.Value("binary")
    features = datasets.Features({"picture": value, "says": datasets.Value("string")})
    stored = columns if kind == "binary" else columns | {"picture": [{"bytes": b} for b in columns["picture"]]}
    datasets.Dataset.from_dict(stored, features=features).to_parquet(path / "train.parquet")
    sources = dataset_sources(str(path), None, image_column="picture", caption_column="says")
    assert [(source.caption, _shade(source)) for source in sources] == [("one", 0), ("two", 80)]


def test_pictures_are_read_as_those_of_a_folder_are(tmp_path: Path) -> None:
    """Upright, on white, with bounds, unlike the library's own decoding."""
    path = tmp_path / "tables"
    path.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear, "PNG")
    cells = [_picture(9, (20, 30), exif=exif), clear.getvalue(), b"no picture", None]
    features = datasets.Features({"image": datasets.Image()})
    given = {"image": [None if cell is None else {"bytes": cell} for cell in cells]}
    datasets.Dataset.from_dict(given, features=features).to_parquet(path / "train.parquet")
    upright, transparent, broken, empty = dataset_sources(str(path), "a <c>")
    assert upright.read().rgb.size == (30, 20)
    assert transparent.read().rgb.getpixel((0, 0)) == (255, 255, 255)
    assert transparent.read().mask is not None
    with pytest.raises(QrloraError, match=r"row 2 of .*tables is no readable picture"):
        broken.read()
    with pytest.raises(QrloraError, match=r"row 3 of .*tables has no picture in image"):
        empty.read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "pixels"}, r"image_column: .*pets has no column 'pixels'; it has image, text, age\."),
        ({"caption_column": "prompt"}, r"caption_column: .* has no column 'prompt'; it has image, text, age\."),
        ({"image_column": "text"}, r"image_column: text of .*pets holds no pictures .*; image does\."),
        ({"caption_column": "age"}, r"caption_column: age of .*pets holds int, not text"),
        ({"prompt": None}, r"have no captions; give caption_column \(the columns are image, text, age\) or instance"),
        ({"prompt": None, "caption_column": "text"}, r"row 1 of .*pets has an empty text; give instance_prompt"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(folder: Path, options: dict[str, Any], message: str) -> None:
    prompt = options.pop("prompt", "a <c>")
    with pytest.raises(QrloraError, match=message):
        dataset_sources(str(folder), prompt, **options)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match=r"dataset_name: there is no folder .*nowhere"):
        dataset_sources(str(tmp_path / "nowhere"), "a <c>")
    with pytest.raises(QrloraError, match=r"dataset_name: nobody/nothing cannot be loaded"):
        dataset_sources("nobody/nothing", "a <c>")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QrloraError, match=r"dataset_name: .*empty cannot be loaded"):
        dataset_sources(str(tmp_path / "empty"), "a <c>")


def test_a_data_set_without_a_training_split(folder: Path) -> None:
    held = folder / "test"
    held.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(held / path.name)
    with pytest.raises(QrloraError, match=r"has no split 'train'; it has test\."):
        dataset_sources(str(folder), "a <c>")


def test_a_picture_that_vanished(folder: Path) -> None:
    sources = dataset_sources(str(folder), "a <c>")
    (folder / "1.png").unlink()
    with pytest.raises(QrloraError, match=r"there is no picture .*1\.png"):
        sources[1].read()


def test_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(QrloraError, match=r"pip install datasets"):
        dataset_sources(str(folder), "a <c>")


def test_no_bars_off_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset_sources(str(folder), "a <c>")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert datasets.is_progress_bar_enabled()
