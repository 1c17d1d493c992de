"""Optimisers on the device they are for: what they compute, masks, and states that come back from their tensors."""

import pytest
import torch
from torch import Tensor, nn

from qrlora.adapter import AdapterSpec, add_adapter, trainable_parameters
from qrlora.training.optimiser import load_optimiser_tensors, make_optimiser, optimiser_tensors
from tests.tiny_models import tiny_flux
from tests.training.test_optimisers import WAYS, adamw_by_hand, config_of, gradients_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the packages warn of missing kernels and deprecations of their own
]


def _go(optimiser: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.cuda()
        optimiser.step()


@pytest.mark.parametrize("way", ["adamw", "8bit"])
def test_adamw_is_near_its_formula(way: str) -> None:
    start, gradients = torch.linspace(-1, 1, 4096).reshape(64, 64), gradients_of(20, (64, 64))
    parameter = nn.Parameter(start.cuda())
    optimiser = make_optimiser(config_of(**WAYS[way]), [parameter])
    _go(optimiser, parameter, gradients)
    expected = adamw_by_hand(start, gradients, 1e-2, 0.1)
    off = float((parameter.detach().cpu() - expected).norm()) / float((expected - start).norm())
    assert off < (0.1 if way == "8bit" else 1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_states_come_back_from_their_tensors(way: str) -> None:
    config, gradients = config_of(**WAYS[way]), gradients_of(8, (64, 64))
    first, second = nn.Parameter(torch.ones(64, 64).cuda()), nn.Parameter(torch.zeros(64, 64).cuda())
    before, after = make_optimiser(config, [first]), make_optimiser(config, [second])
    _go(before, first, gradients[:5])
    kept = {key: value.cpu().clone() for key, value in optimiser_tensors(before, {"a": first}).items()}
    _go(before, first, gradients[5:])
    load_optimiser_tensors(after, {"a": second}, kept)
    _go(after, second, gradients[5:])
    assert torch.equal(first, second)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("way", WAYS)
def test_masked_coefficients_stay_exactly_zero(way: str, side: str) -> None:
    denoiser = tiny_flux(width=128).cuda()
    add_adapter(denoiser, AdapterSpec(rank=64, side=side, init="normal"), "content")
    parameters = trainable_parameters(denoiser, "content")
    assert all(parameter.numel() >= 4096 for parameter in parameters.values())
    optimiser = make_optimiser(config_of(**WAYS[way]), parameters.values())
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for parameter in parameters.values():
            (parameter * torch.randn(parameter.shape, generator=generator).cuda()).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    for name, parameter in parameters.items():
        outside = parameter.detach().tril(-1) if "lora_A" in name else parameter.detach().triu(1)
        assert int(outside.count_nonzero()) == 0, name
