"""One door for every layout: what is chosen, what is left out, and what is told of it."""

from pathlib import Path

import pytest
import torch

import qrlora
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import format_names, import_adapter, read_adapter, recognise, write_adapter
from qrlora.merging import merge
from tests.adapters_of_data import made
from tests.real_layers import assert_same_updates, real_adapter, save

ENCODER = {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": torch.ones(2, 2)}


def with_more(path: Path, **more: torch.Tensor) -> Path:
    from safetensors.torch import load_file

    return save({**load_file(path), **more}, path)


@pytest.mark.parametrize("format", ["diffusers", "peft", "kohya", "comfy"])
def test_every_format_is_recognised_by_its_header_alone(tmp_path: Path, format: str) -> None:
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    adapter = real_adapter("flux", "attn.to_q", "attn.to_k", "attn.to_v")
    found = recognise(write_adapter(adapter, path, format))
    assert found.layout.name == format
    assert found.needs is None
    layers = {layer for matched in found.matched.values() for layer in matched.split(", ")}
    assert layers >= set(adapter.layers)
    assert str(len(found.matched)) in found.evidence or format == "peft"


def test_formats_that_can_be_written() -> None:
    assert format_names() == ("comfy", "diffusers", "kohya", "own", "peft")


@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfy"])
def test_what_is_not_understood_is_an_error_unless_allowed(tmp_path: Path, format: str) -> None:
    adapter = real_adapter("flux", "attn.to_q")
    path = with_more(write_adapter(adapter, tmp_path / "a.safetensors", format), **ENCODER)
    with pytest.raises(QrloraError, match=r"1 of \d+ keys are not understood .*, 1 of them of text encoders: lora_te3"):
        read_adapter(path)
    with pytest.warns(QrloraWarning, match="1 keys are not understood and left out"):
        assert_same_updates(read_adapter(path, allow_unmatched=True), adapter.layers)
    assert import_adapter(path, allow_unmatched=True).recognised.unmatched == tuple(ENCODER)


def test_the_layout_with_most_keys_reads_a_mixed_file(tmp_path: Path) -> None:
    adapter = real_adapter("flux", "attn.to_q")
    kohya = {"lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.ones(2, 2)}
    path = with_more(write_adapter(adapter, tmp_path / "a.safetensors"), **kohya)
    with pytest.raises(QrloraError, match="not understood as diffusers: lora_unet_double_blocks_0_img_mlp_0"):
        read_adapter(path)


def test_load_adapter_reads_them_too(tmp_path: Path) -> None:
    adapter = real_adapter("sdxl", "attn1.to_q")
    path = write_adapter(adapter, tmp_path / "a.safetensors", "kohya")
    assert_same_updates(qrlora.load_adapter(path), adapter.layers)


def test_files_of_several_tools_merge(tmp_path: Path) -> None:
    one, other = real_adapter("flux", "attn.to_q", seed=1), real_adapter("flux", "attn.to_q", seed=2)
    files = [write_adapter(one, tmp_path / "a.safetensors", "kohya"), write_adapter(other, tmp_path / "b", "peft")]
    merged = merge([read_adapter(path) for path in files], [0.5, 1.0], "concat")
    for name, pair in merged.layers.items():
        expected = 0.5 * one.layers[name].delta().double() + other.layers[name].delta().double()
        torch.testing.assert_close(pair.delta().double(), expected, rtol=0, atol=1e-5)


def test_the_norm_of_an_update_needs_no_dense_matrix() -> None:
    for pair in made().layers.values():
        assert pair.norm() == pytest.approx(float(pair.delta().double().norm()), rel=1e-6)


def test_coefficients_alone_are_recognised(tmp_path: Path) -> None:
    path = made().save(tmp_path / "a.safetensors", coefficients_only=True)
    assert recognise(path).layout.name == "coefficients"
    with pytest.raises(QrloraError, match="holds coefficients only, which need their base model"):
        read_adapter(path)


def test_what_is_finite_in_the_file_alone_is_refused(tmp_path: Path) -> None:
    """1e200 is a number in float64 and none in the float32 that factors are."""
    huge = {"transformer.x.to_q.lora_A.weight": torch.ones(2, 4, dtype=torch.float64) * 1e200}
    path = save({**huge, "transformer.x.to_q.lora_B.weight": torch.ones(4, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(QrloraError, match=r"x\.to_q has values that are not finite"):
        read_adapter(path)


@pytest.mark.parametrize("option", [{"basis": "ica"}, {"lora_alpha": 8.0}, {"top_k": 3}])
def test_options_that_mean_nothing_to_a_layout_are_refused(tmp_path: Path, option: dict) -> None:
    path = write_adapter(real_adapter("flux", "attn.to_q"), tmp_path / "a.safetensors", "diffusers")
    with pytest.raises(QrloraError, match=f"to which {next(iter(option))} means nothing"):
        read_adapter(path, **option)
