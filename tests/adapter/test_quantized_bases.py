"""Quantised bases, where their packages are installed: the basis comes from the weight the layer computes with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qrlora.adapter import adapter_of, adapters_disabled, add_adapter, attach_adapter
from qrlora.adapter._weights import dense_weight
from qrlora.errors import QrloraWarning
from tests.adapter.test_add_adapter import shake, spec_for
from tests.tiny_models import FLUX_TARGETS, flux_inputs, output, tiny_flux

# These packages warn of missing kernels and deprecations of their own.
pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH = 64


def quantized(replacement: Callable[[nn.Linear], nn.Module]) -> Any:
    denoiser = tiny_flux(width=WIDTH)
    for name, module in list(denoiser.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{target}" for target in FLUX_TARGETS)):
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, replacement(module))
    return denoiser


def nf4() -> Any:
    bnb = pytest.importorskip("bitsandbytes")

    def replace(layer: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.float32)
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
        made.bias = layer.bias
        return made.to("cpu")

    return quantized(replace)


def gguf() -> Any:
    package = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    def replace(layer: nn.Linear) -> nn.Module:
        kind = package.GGMLQuantizationType.Q8_0
        packed = torch.from_numpy(package.quants.quantize(layer.weight.detach().numpy(), kind).copy())
        made = GGUFLinear(layer.in_features, layer.out_features, compute_dtype=torch.float32)
        made.weight = GGUFParameter(packed, quant_type=kind)
        made.bias = layer.bias
        return made

    return quantized(replace)


def torchao() -> Any:
    package = pytest.importorskip("torchao.quantization")
    denoiser = tiny_flux(width=WIDTH)
    chosen = tuple(f".{target}" for target in FLUX_TARGETS)
    package.quantize_(
        denoiser,
        package.Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: isinstance(m, nn.Linear) and name.endswith(chosen),
    )
    return denoiser


@pytest.mark.parametrize(("make", "error"), [(nf4, 0.12), (gguf, 0.01), (torchao, 0.01)])
def test_start_basis_and_return(make: Callable[[], Any], error: float) -> None:
    denoiser, given, plain = make(), flux_inputs(width=WIDTH), tiny_flux(width=WIDTH)
    base = output(denoiser, given)
    names = add_adapter(denoiser, spec_for("flux"), "content")
    assert torch.equal(output(denoiser, given), base)
    for name in names:
        original: Any = plain.get_submodule(name)
        dense = dense_weight(denoiser.get_submodule(name), name).float()
        assert float((dense - original.weight).norm() / original.weight.norm()) < error
    shake(denoiser, "content")
    assert not torch.equal(output(denoiser, given), base)
    with adapters_disabled(denoiser):
        assert torch.equal(output(denoiser, given), base)
    adapter = adapter_of(denoiser, "content")
    assert adapter.header is not None
    assert all(value.startswith("packed-") for value in adapter.header.weight_hashes.values())
    with pytest.warns(QrloraWarning, match="could not be verified"):
        attach_adapter(plain, adapter, "content")
