"""Denoisers quantised as they are loaded: which layers, what they compute, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from torch import nn

from qrlora.adapter import adapters_disabled, add_adapter, dense_weight, trainable_parameters
from qrlora.errors import QrloraError
from qrlora.models import LoadedModel, load_pipeline, quantized_layers, repeated_blocks
from tests.adapter.test_quantized_bases import as_float8, as_int8, as_nf4
from tests.tiny_models import flux_inputs, output

# bitsandbytes and torchao warn of missing kernels and deprecations of their own
pytestmark = pytest.mark.filterwarnings("ignore")
# The definition in float64 and its tolerance: scales of 4 bits are quantised to 8 bits themselves.
WAYS: dict[Any, Any] = {
    "nf4": (as_nf4, 6e-2),
    "int8": (lambda weight: as_int8(weight, 127.5), 2e-3),
    "fp8": (as_float8, 1e-2),
}


def generated(model: LoadedModel) -> Any:
    return model.family.generate(model.pipeline, ["a cat"], seeds=[1], **model.defaults.model_dump())[0]


@pytest.mark.parametrize("kind", WAYS)
def test_exactly_the_linear_layers_in_the_blocks_are_quantised(tiny_flux: Path, kind: Any) -> None:
    whole, model = load_pipeline(tiny_flux).denoiser, load_pipeline(tiny_flux, quantization=kind).denoiser
    chosen = quantized_layers(model)
    assert chosen == quantized_layers(whole)
    assert "single_transformer_blocks.0.proj_out" in chosen  # diffusers would spare it with the last projection
    assert "proj_out" not in chosen
    define, tolerance = WAYS[kind]
    for name, layer in whole.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        quantised: Any = model.get_submodule(name)
        if name not in chosen:
            assert torch.equal(quantised.weight, layer.weight), name
            continue
        assert any(name.startswith(f"{block}.") for block in repeated_blocks(whole))
        assert torch.equal(quantised.bias, layer.bias)
        expected = define(layer.weight.detach())
        assert float((dense_weight(quantised, name).double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("kind", WAYS)
def test_an_adapter_starts_from_the_quantised_base_and_pictures_are_made(tiny_flux: Path, kind: Any) -> None:
    model = load_pipeline(tiny_flux, quantization=kind)
    assert generated(model).size == (32, 32)
    denoiser: Any = model.denoiser
    given = {
        "hidden_states": torch.randn(2, 4, 16),
        "encoder_hidden_states": torch.randn(2, 3, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.2, 0.8]),
        "img_ids": flux_inputs()["img_ids"],
        "txt_ids": torch.zeros(3, 3),
    }
    base = output(denoiser, given)
    add_adapter(denoiser, model_spec(), "content")
    assert torch.equal(output(denoiser, given), base)
    for parameter in trainable_parameters(denoiser, "content").values():
        parameter.data += 0.1
    assert not torch.equal(output(denoiser, given), base)
    with adapters_disabled(denoiser):
        assert torch.equal(output(denoiser, given), base)


def model_spec() -> Any:
    from qrlora.adapter import AdapterSpec

    return AdapterSpec(rank=4)


@pytest.mark.parametrize("kind", WAYS)
def test_under_autocast_a_quantised_layer_gives_what_a_plain_one_gives(tiny_flux: Path, kind: Any) -> None:
    """bf16 also for fp32 input, such as norms give on CUDA; else everything after the first norm would be fp32."""
    model: Any = load_pipeline(tiny_flux, dtype=torch.bfloat16, quantization=kind).denoiser
    layer = model.transformer_blocks[0].ff.net[2]
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_what_cannot_be_had_is_said_before_anything_is_read(tiny_flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QrloraError, match="quantization=nf8 is not known; there are nf4, int8, fp8"):
        load_pipeline(tiny_flux, quantization="nf8")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("qrlora.models._quantization.find_spec", lambda _: None)
    for kind, package in (("nf4", "bitsandbytes"), ("int8", "torchao")):
        with pytest.raises(QrloraError, match=f"not installed; pip install {package}"):
            load_pipeline("nobody/nothing-here", quantization=kind)


def test_a_folder_that_was_saved_quantised_is_loaded_as_it_is(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_flux, folder)
    with monkeypatch.context() as patch:
        # diffusers itself quantises on a GPU alone.
        patch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
        patch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda _, device_map: device_map)
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        stock = FluxTransformer2DModel.from_pretrained(tiny_flux, subfolder="transformer", quantization_config=how)
    shutil.rmtree(folder / "transformer")
    stock.save_pretrained(folder / "transformer")
    again = load_pipeline(folder).denoiser
    names = [name for name, layer in again.named_modules() if isinstance(layer, nn.Linear)]
    assert "proj_out" in names
    for name in names:
        loaded: Any = again.get_submodule(name)
        assert type(loaded.weight).__name__ == "Params4bit"
        assert torch.equal(dense_weight(loaded, name), dense_weight(stock.get_submodule(name), name))
    with pytest.raises(QrloraError, match="is quantised already; leave quantization out"):
        load_pipeline(folder, quantization="int8")
