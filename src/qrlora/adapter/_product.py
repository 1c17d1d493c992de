"""A low-rank pair beside a frozen weight, as one step of autograd: what is kept for the backward pass, and no more.

With `x [T, n]`, `A [r, n]`, `B [m, r]`, a scale s and the output's gradient `G [T, m]`:

    h  = x A^T              [T, r]
    y  = x W^T + b + s h B^T        added in place to the base's own product
    E  = s G B              [T, r]
    dx = G W + E A                  likewise
    dA = E^T x,  dB = s G^T h

So x is kept where A is trained, h alone where only B is. Autograd's own way makes `h B^T` and `E A` as tensors of their
own, and reads and writes each of them again to add them up. Factors may be wider than x: they are cast where they are
used, forward and backward, and so kept as the parameters that they are.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_with_pair(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float = 1.0
) -> Tensor:
    """`x W^T + b + scale (x A^T) B^T`, with W and b frozen.

    Args:
        x: `[..., n]`, at least two dimensions.
        weight: `[m, n]`, of x's dtype, never given a gradient.
        bias: `[m]` or None, likewise.
        A: `[r, n]`, of any floating dtype.
        B: `[m, r]`, likewise.
        scale: of the pair.

    Returns:
        `[..., m]`; to the last bit what `F.linear` gives where `B A` is zero.
    """
    return cast(Any, _LinearWithPair).apply(x, weight, bias, A, B, scale)


def plus_pair(base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """`base + scale (x A^T) B^T`, where the base's product is computed elsewhere, as quantised layers do.

    Args:
        base: `[..., m]`; left as it is.
        x: `[..., n]`, at least two dimensions, in the dtype that the pair is computed in.
        A: `[r, n]`, of any floating dtype.
        B: `[m, r]`, likewise.
        scale: of the pair.

    Returns:
        `[..., m]`, of the base's dtype; where that is another than x's, `h B^T` is a tensor of its own.
    """
    return cast(Any, _PlusPair).apply(base, x, A, B, scale)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is; torch refuses the question for the meta device."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


class _LinearWithPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        output = F.linear(x, weight, bias)
        h = x.flatten(0, -2).mm(A.to(x.dtype).t())
        output.view(-1, output.shape[-1]).addmm_(h, B.to(x.dtype).t(), alpha=scale)
        _keep(ctx, ctx.needs_input_grad[0], ctx.needs_input_grad[3:5], x, h, A, B, scale, weight)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with _dtypes_as_they_are(gradients[0]):
            dx, dA, dB = _gradients(ctx, gradients[0])
        return dx, None, None, dA, dB, None


class _PlusPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        with _dtypes_as_they_are(x):
            h = x.flatten(0, -2).mm(A.to(x.dtype).t())
            flat, low = base.flatten(0, -2), B.to(x.dtype).t()
            if base.dtype == x.dtype:
                output = torch.addmm(flat, h, low, alpha=scale)
            else:
                output = flat.add(h.mm(low), alpha=scale).to(base.dtype)
        output = output.view(base.shape)
        _keep(ctx, ctx.needs_input_grad[1], ctx.needs_input_grad[2:4], x, h, A, B, scale, None)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with _dtypes_as_they_are(gradients[0]):
            dx, dA, dB = _gradients(ctx, gradients[0])
        return gradients[0], dx, dA, dB, None


def _keep(
    ctx: Any,
    into_x: bool,
    into_pair: tuple[bool, bool],
    x: Tensor,
    h: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    weight: Tensor | None,
) -> None:
    into_A, into_B = into_pair
    ctx.save_for_backward(
        x if into_A else None,
        h if into_B else None,
        A if into_x else None,
        B if into_x or into_A else None,
        weight if into_x else None,
    )
    ctx.wanted, ctx.scale, ctx.dtypes = (into_x, into_A, into_B), scale, (x.dtype, A.dtype, B.dtype)


def _dtypes_as_they_are(tensor: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, which would also change a backward pass that runs inside it."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else nullcontext()


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, A and B, as far as they are wanted."""
    x, h, A, B, weight = ctx.saved_tensors
    into_x, into_A, into_B = ctx.wanted
    computed, dtype_A, dtype_B = ctx.dtypes
    G, scale = gradient.flatten(0, -2).to(computed), ctx.scale
    dx = dA = dB = None
    if into_x or into_A:
        E = G.mm(B.to(G.dtype))
        if scale != 1:
            E.mul_(scale)
        if into_A:
            # A copy of [r, T]: the product with a transposed view takes twice as long on a CPU.
            dA = E.t().contiguous().mm(x.flatten(0, -2)).to(dtype_A)
        if into_x:
            low = A.to(G.dtype)
            dx = E.mm(low) if weight is None else G.mm(weight).addmm_(E, low)
            dx = dx.view(*gradient.shape[:-1], low.shape[1])
    if into_B:
        dB = G.t().mm(h)
        if scale != 1:
            dB.mul_(scale)
        dB = dB.to(dtype_B)
    return dx, dA, dB
