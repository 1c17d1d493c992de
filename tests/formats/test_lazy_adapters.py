"""Adapters whose layers are read when they are asked for: equal to those read at once, and refused as they are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank, read_adapter, write_adapter, write_native
from qrlora.formats._layers import LayersOnDemand
from tests.adapters_of_data import CONV, LINEAR, made, with_words
from tests.real_layers import real_adapter


def assert_same(lazy: Adapter, whole: Adapter) -> None:
    assert isinstance(lazy.layers, LayersOnDemand)
    assert list(lazy.layers) == list(whole.layers)
    assert (lazy.header, lazy.component, lazy.rank) == (whole.header, whole.component, whole.rank)
    for name, pair in whole.layers.items():
        again = lazy.layers[name]
        assert torch.equal(again.A, pair.A)
        assert torch.equal(again.B, pair.B)
        assert lazy.shapes[name].shape == pair.shape
        assert (again.A.dtype, again.B.dtype) == (torch.float32, torch.float32)
    assert lazy.companions.keys() == whole.companions.keys()
    for component, companion in whole.companions.items():
        assert_same(lazy.companions[component], companion)


@pytest.mark.parametrize("save_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("side", ["output", "input", None])
def test_read_lazily_is_read(tmp_path: Path, side: str | None, save_dtype: str) -> None:
    file = made(side=side, header=side is not None).save(tmp_path / "a.safetensors", save_dtype=save_dtype)
    assert_same(read_adapter(file, lazy=True), read_adapter(file))
    folder = write_adapter(made(side=side), tmp_path / "peft", "peft")
    assert_same(read_adapter(folder, lazy=True), read_adapter(folder))


def test_with_text_encoders(tmp_path: Path) -> None:
    file = with_words(1, "text_encoder", "text_encoder_2").save(tmp_path / "a.safetensors")
    assert_same(read_adapter(file, lazy=True), read_adapter(file))


def test_scales_are_baked_in(tmp_path: Path) -> None:
    tensors = {
        "transformer.x.lora_A.weight": torch.randn(2, 5),
        "transformer.x.lora_B.weight": torch.randn(4, 2),
        "transformer.x.alpha": torch.tensor(7.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    lazy = read_adapter(tmp_path / "a.safetensors", lazy=True)
    assert_same(lazy, read_adapter(tmp_path / "a.safetensors"))
    expected = 3.5 * tensors["transformer.x.lora_B.weight"] @ tensors["transformer.x.lora_A.weight"]
    torch.testing.assert_close(lazy.layers["x"].delta(), expected)


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "comfy"])
def test_written_lazily_is_the_same_file(tmp_path: Path, format: str) -> None:
    file = real_adapter("flux", "attn.to_q", "attn.to_k", "ff.net.2").save(tmp_path / "a.safetensors")
    outputs: list[bytes] = []
    for lazy in (True, False):
        path = tmp_path / (f"{lazy}" if format == "peft" else f"{lazy}.safetensors")
        write_adapter(read_adapter(file, lazy=lazy), path, format, save_dtype="bf16")
        outputs.append((path / "adapter_model.safetensors" if format == "peft" else path).read_bytes())
    assert outputs[0] == outputs[1]


def test_layouts_that_must_see_everything_are_read_at_once(tmp_path: Path) -> None:
    file = write_adapter(real_adapter("flux", "attn.to_q"), tmp_path / "k.safetensors", "kohya")
    assert isinstance(read_adapter(file, lazy=True).layers, dict)


def test_values_are_checked_when_they_are_read(tmp_path: Path) -> None:
    file = made().save(tmp_path / "a.safetensors")
    tensors = load_file(file)
    tensors[f"transformer.{CONV}.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    lazy = read_adapter(file, lazy=True)
    assert lazy.layers[LINEAR].rank == 3
    with pytest.raises(QrloraError, match=rf"a.safetensors: {CONV}\.lora_B.weight has values that are not finite"):
        lazy.layers[CONV]
    target = tmp_path / "b.safetensors"
    target.write_text("old")
    with pytest.raises(QrloraError, match="not finite"):
        lazy.save(target)
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_file_that_is_another_by_now_is_refused(tmp_path: Path) -> None:
    file = made(0).save(tmp_path / "a.safetensors")
    lazy = read_adapter(file, lazy=True)
    made(1).save(file)
    with pytest.raises(QrloraError, match=r"a.safetensors has changed since it was opened; read it again"):
        lazy.layers[LINEAR]
    file.unlink()
    with pytest.raises(QrloraError, match=r"a.safetensors cannot be read"):
        lazy.layers[LINEAR]


def test_an_adapter_may_be_written_over_the_file_it_reads(tmp_path: Path) -> None:
    file = made().save(tmp_path / "a.safetensors")
    expected = made().scaled(2).layers[LINEAR].delta()
    read_adapter(file, lazy=True).scaled(2).save(file)
    assert torch.equal(read_adapter(file).layers[LINEAR].delta(), expected)


def test_no_value_is_read_for_shapes_and_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = with_words(1, "text_encoder").save(tmp_path / "a.safetensors")
    monkeypatch.setattr("qrlora.formats._tensors_later._read_one", lambda *_: pytest.fail("read"))
    lazy = read_adapter(file, lazy=True)
    assert lazy.rank == 3
    assert lazy.scaled(0.5).shapes[CONV].shape == (8, 4, 3, 3)
    with pytest.raises(KeyError):
        lazy.layers["other"]


def test_mixed_ranks(tmp_path: Path) -> None:
    wide = LowRank(torch.randn(12, 5), torch.randn(5, 10))
    mixed = Adapter({**made(header=False).layers, LINEAR: wide}, None)
    file = write_native(mixed, tmp_path / "a.safetensors")
    lazy = read_adapter(file, lazy=True)
    assert_same(lazy, read_adapter(file))
    assert lazy.rank == 5
