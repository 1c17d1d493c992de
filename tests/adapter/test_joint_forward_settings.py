"""Plain adapters in one product wherever models are put: quantised, under autocast, checkpointed, compiled, empty."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qrlora.adapter import add_adapter, set_adapters
from tests.adapter.test_add_adapter import shake, spec_for
from tests.adapter.test_joint_forward import (
    LAYER,
    adapted,
    close,
    gradients,
    made_stock,
    same_gradients,
)
from tests.adapter.test_quantized_bases import WIDTH, quantized
from tests.tiny_models import flux_inputs, inputs, output

# peft warns whenever a second adapter is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
QUANTISED = ["nf4", "int8", "torchao int8", "q8_0"]


@pytest.mark.filterwarnings("ignore")  # bitsandbytes and torchao, of missing kernels
@pytest.mark.parametrize("way", QUANTISED)
def test_on_quantised_bases(way: str) -> None:
    ours = quantized(way).train()
    add_adapter(ours, spec_for("flux"), "content")
    shake(ours, "content")
    given = flux_inputs(width=WIDTH)
    outputs, found = output(ours, given), gradients(ours, given)
    made_stock(ours)
    assert close(outputs, output(ours, given), 1e-4)
    assert same_gradients(found, gradients(ours, given), 1e-3)


def test_with_gradient_checkpointing() -> None:
    ours, given = adapted("flux").train(), inputs("flux")
    expected = gradients(ours, given)
    ours.enable_gradient_checkpointing()
    again = gradients(ours, given)
    assert all(torch.equal(again[key], expected[key]) for key in expected)


# torch's own tracing makes an object of the function and is warned of it by torch.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    """The layer is one graph, for one adapter, at a new weight, for two; `aot_eager` traces the backward pass too."""
    ours = adapted("flux", ("content", "style"))
    layer: Any = ours.get_submodule(LAYER)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for weights in ({"content": 0.5}, {"content": -1.3}, {"content": 0.5, "style": 1.5}):
        set_adapters(ours, weights)
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(7), requires_grad=True)
        results: list[list[Tensor | None]] = []
        for compute in (layer, compiled):
            x.grad, ours.get_submodule(LAYER).lora_A["content"].weight.grad = None, None
            result = compute(x)
            result.square().sum().backward()
            results.append([result.detach(), x.grad, layer.lora_A["content"].weight.grad])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def trained_by(layer: Any, x: Tensor) -> list[Tensor]:
    """Output, and gradients of x and of the coefficients, under autocast."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x)
    return [result.detach(), *torch.autograd.grad(result.float().square().sum(), [x, layer.lora_A["content"].weight])]


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", QUANTISED)
def test_on_quantised_bases_under_autocast(way: str, dtype: torch.dtype) -> None:
    """Some of them give back fp32 for an input in fp32 while everything else computes in bf16."""
    ours = quantized(way)
    add_adapter(ours, spec_for("flux"), "content")
    shake(ours, "content")
    layer = ours.get_submodule(LAYER)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = trained_by(layer, x)
    made_stock(ours)
    for one, other in zip(found, trained_by(layer, x), strict=True):
        assert one.dtype == other.dtype
        assert close(one, other, 0.01)


def test_a_backward_pass_inside_autocast_computes_in_the_forwards_dtype() -> None:
    ours = adapted("flux")
    layer: Any = ours.get_submodule(LAYER)
    found: list[list[Tensor | None]] = []
    for inside in (False, True):
        ours.zero_grad()
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(7), requires_grad=True)
        result = layer(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            result.backward()
        found.append([x.grad, layer.lora_A["content"].weight.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_float64_is_left_alone_by_autocast() -> None:
    layer: Any = adapted("flux").double().get_submodule(LAYER)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_shapes_are_worked_out_without_values() -> None:
    empty = adapted("flux", ("content", "style")).to("meta")
    result = empty.get_submodule(LAYER)(torch.empty(2, 5, 32, device="meta"))
    assert result.is_meta
    assert result.shape == (2, 5, 32)
