"""Quantised bases on the device they are for: the definitions that the CPU tests hold, and training on them."""

from typing import Any

import pytest
import torch
from torch import nn

from qrlora.adapter import adapters_disabled, add_adapter, dense_weight, trainable_parameters
from qrlora.basis import make_basis, principal_angle
from tests.adapter.test_add_adapter import shake, spec_for
from tests.adapter.test_quantized_bases import WAYS, WIDTH
from tests.tiny_models import FLUX_TARGETS, flux_inputs, output, run, tiny_flux

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the packages warn of missing kernels and deprecations of their own
]


def quantized_on_cuda(way: str) -> Any:
    """Packed on the CPU, then moved."""
    denoiser = tiny_flux(width=WIDTH)
    for name, module in list(denoiser.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{target}" for target in FLUX_TARGETS)):
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, WAYS[way][0](module))
    return denoiser.cuda()


@pytest.mark.parametrize("way", WAYS)
def test_start_basis_training_and_return(way: str) -> None:
    denoiser, plain = quantized_on_cuda(way), tiny_flux(width=WIDTH)
    given = {key: value.cuda() for key, value in flux_inputs(width=WIDTH).items()}
    _, define, tolerance, _ = WAYS[way]
    base = output(denoiser, given)
    names = add_adapter(denoiser, spec_for("flux"), "content")
    assert torch.equal(output(denoiser, given), base)
    for name in names:
        original: Any = plain.get_submodule(name)
        expected, layer = define(original.weight.detach()), denoiser.get_submodule(name)
        dense = dense_weight(layer, name).cpu().double()
        assert float((dense - expected).norm() / expected.norm()) < tolerance
        assert principal_angle(layer.lora_B["content"].weight.cpu(), make_basis(dense, 6).vectors) < 0.01
    run(denoiser, given).float().square().mean().backward()
    gradients = [parameter.grad for parameter in trainable_parameters(denoiser, "content").values()]
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > len(names) * 0.6
    shake(denoiser, "content")
    assert not torch.equal(output(denoiser, given), base)
    with adapters_disabled(denoiser):
        assert torch.equal(output(denoiser, given), base)
