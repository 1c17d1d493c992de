"""Plain adapters in one product on CUDA: against dense float64 on the CPU, and without waiting for the device."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qrlora.adapter import add_adapter, set_adapters
from qrlora.adapter._product import linear_with_pair
from tests.adapter.test_joint_forward import LAYER, shake, spec_for
from tests.tiny_models import tiny_flux

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_values_and_gradients_in_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 64, 96), "W": (80, 96), "b": (80,), "A": (8, 96), "B": (80, 8), "target": (2, 64, 80)}
    values = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in shapes.items()}

    def results(dtype: torch.dtype, device: str, ours: bool) -> list[Tensor]:
        now = {key: value.to(device, dtype) for key, value in values.items()}
        now["A"] = now["A"].to(torch.float32 if ours else dtype)
        x, A = now["x"].requires_grad_(), now["A"].requires_grad_()
        if ours:
            output = linear_with_pair(x, now["W"], now["b"], A, now["B"], 0.3)
        else:
            output = F.linear(x, now["W"] + 0.3 * now["B"] @ A, now["b"])
        output.backward(now["target"])
        return [tensor.detach().cpu().double() for tensor in (output, x.grad, A.grad) if tensor is not None]

    for got, exact in zip(
        results(torch.bfloat16, "cuda", ours=True), results(torch.float64, "cpu", ours=False), strict=True
    ):
        assert float((got - exact).norm() / exact.norm()) < 0.01


def test_adapters_of_one_basis_are_compared_once() -> None:
    denoiser: Any = tiny_flux()
    weights = {"content": 0.5, "style": 1.5}
    for name in weights:
        add_adapter(denoiser, spec_for("flux"), name)
        shake(denoiser, name)
    set_adapters(denoiser, weights)
    layer = denoiser.to("cuda").get_submodule(LAYER)
    x = torch.randn(2, 5, 32, device="cuda")
    with torch.no_grad():
        first = layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)
