"""The product with a low-rank pair: its values and gradients against dense float64, and what it keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qrlora.adapter._product import linear_with_pair, plus_pair

T, N, M, R = 5, 7, 6, 3
WAYS = ["linear", "linear without bias", "plus"]


def tensors(dtype: torch.dtype = torch.float64, *rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (*(rows or (2, T)), N), "W": (M, N), "b": (M,), "A": (R, N), "B": (M, R)}
    return {
        key: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for key, shape in shapes.items()
    }


def product(way: str, W: Tensor, b: Tensor, scale: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if way == "plus":
        return lambda x, A, B: plus_pair(F.linear(x, W, b), x, A, B, scale)
    return lambda x, A, B: linear_with_pair(x, W, None if way.endswith("bias") else b, A, B, scale)


@pytest.mark.parametrize("trained", ["x", "A", "B", "xA", "xB", "AB", "xAB"])
@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(way: str, trained: str) -> None:
    given = tensors()
    inputs = [given[key].requires_grad_(key in trained) for key in "xAB"]
    assert torch.autograd.gradcheck(product(way, given["W"], given["b"], 1.5), inputs)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    rank=st.integers(1, 4),
    scale=st.sampled_from([1.0, 0.5, -2.0, 0.0]),
    way=st.sampled_from(WAYS),
)
def test_values_are_those_of_the_dense_weight(rows: list[int], rank: int, scale: float, way: str) -> None:
    generator = torch.Generator().manual_seed(rank)
    x, W, b, A, B = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((*rows, N), (M, N), (M,), (rank, N), (M, rank))
    )
    expected = x @ (W + scale * B @ A).T + (0 if way.endswith("bias") else b)
    torch.testing.assert_close(product(way, W, b, scale)(x, A, B), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_zero_factor_leaves_the_base_bit_for_bit(way: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = tensors(dtype)
        base = F.linear(given["x"], given["W"], None if way.endswith("bias") else given["b"])
        zero = torch.zeros_like(given["A"])
        assert torch.equal(product(way, given["W"], given["b"], 1.0)(given["x"], zero, given["B"]), base)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_and_gradients_that_are_not_contiguous(way: str) -> None:
    given = tensors()
    crossed = given["x"].transpose(0, 1)
    target = torch.randn(2, T, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).transpose(0, 1)
    compute = product(way, given["W"], given["b"], 1.0)

    def results(x: Tensor, gradient: Tensor) -> list[Tensor | None]:
        x, A = x.detach().requires_grad_(), given["A"].detach().requires_grad_()
        output = compute(x, A, given["B"])
        output.backward(gradient)
        return [output.detach(), x.grad, A.grad]

    for one, other in zip(results(crossed, target), results(crossed.contiguous(), target.contiguous()), strict=True):
        torch.testing.assert_close(one, other)


KEPT = [
    # What is trained, and then the shapes kept for the backward pass beyond the layer's own weights.
    ("x", []),
    ("A", [(2, T, N)]),
    ("xA", [(2, T, N)]),
    ("B", [(2 * T, R)]),
    ("xB", [(2 * T, R)]),
    ("xAB", [(2, T, N), (2 * T, R)]),
]


@pytest.mark.parametrize("wide", [False, True], ids=["one dtype", "factors in fp32"])
@pytest.mark.parametrize(("trained", "expected"), KEPT)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_kept_for_the_backward_pass(
    way: str, trained: str, expected: list[tuple[int, ...]], wide: bool
) -> None:
    given = tensors(torch.bfloat16)
    if wide:
        given |= {key: given[key].float() for key in "AB"}
    weights = {given[key].data_ptr() for key in "WbAB"}
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept.append(tuple(tensor.shape))
        return tensor

    inputs = [given[key].requires_grad_(key in trained) for key in "xAB"]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = product(way, given["W"], given["b"], 2.0)(*inputs)
    assert kept == expected
    output.sum().backward()
    assert all(tensor.grad is None or tensor.grad.dtype == tensor.dtype for tensor in inputs)
    assert all((tensor.grad is not None) == tensor.requires_grad for tensor in inputs)


@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_as_close_to_the_exact_value_as_autograds_own_way(way: str) -> None:
    """The sum is rounded once where adding up rounds three times; gradients come from the same bf16 products."""
    generator = torch.Generator().manual_seed(0)
    n, m, r, rows = 64, 48, 8, 128
    exact = {
        "x": torch.randn(rows, n, generator=generator),
        "W": torch.randn(m, n, generator=generator) * n**-0.5,
        "b": torch.randn(m, generator=generator),
        "A": torch.randn(r, n, generator=generator) * n**-0.5,
        "B": torch.linalg.qr(torch.randn(m, r, generator=generator))[0],
    }
    low = {key: value.bfloat16() for key, value in exact.items()}
    target = torch.randn(rows, m, generator=generator).bfloat16()
    scale = 1.7

    def results(values: dict[str, Tensor], compute: Callable[..., Tensor]) -> list[Tensor]:
        x, A = (values[key].detach().clone().requires_grad_() for key in "xA")
        output = compute(x, A, values["B"])
        output.backward(target.to(output.dtype))
        return [tensor.detach().double() for tensor in (output, x.grad, A.grad) if tensor is not None]

    def by_autograd(values: dict[str, Tensor]) -> Callable[..., Tensor]:
        bias = None if way.endswith("bias") else values["b"]
        return lambda x, A, B: F.linear(x, values["W"], bias) + F.linear(F.linear(x, A), B) * scale

    wide: dict[str, Tensor] = {key: value.double() for key, value in low.items()}
    truth = results(wide, by_autograd(wide))
    ours = results(low, product(way, low["W"], low["b"], scale))
    theirs = results(low, by_autograd(low))
    for value, other, true in zip(ours, theirs, truth, strict=True):
        error, allowed = (float((each - true).norm() / true.norm()) for each in (value, other))
        assert error < 1.1 * allowed < 0.01


def test_a_second_derivative_is_refused() -> None:
    given: dict[str, Any] = tensors()
    x = given["x"].requires_grad_()
    output = linear_with_pair(x, given["W"], given["b"], given["A"], given["B"])
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
