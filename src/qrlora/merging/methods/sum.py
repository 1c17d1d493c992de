"""The exact merge of adapters that share one stored basis: the trained factors are summed, the rank stays."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qrlora.formats import Adapter, Component, LowRank, each_layer
from qrlora.merging._checks import BasesDifferError, basis_differences, common_side, layer_difference
from qrlora.merging._header import merged_header
from qrlora.merging._registry import register_merge

TOLERANCE = 1e-5
_CHUNK = 1 << 16  # elements in float64 at a time, which stay in the cache


@register_merge("sum")
def merge_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """`Q (sum_i w_i dR_i)`: exact at rank r, summed in float64.

    Raises:
        BasesDifferError: the stored bases differ by more than 1e-5 relative in some layer; of adapters that were read
            lazily, when that layer is asked for.
    """
    first = adapters[0]
    side, reason = common_side(adapters)
    if side is None or first.header is None:
        raise _differ(reason, first.component)

    def summed(name: str, pairs: Sequence[LowRank]) -> LowRank:
        if not pairs[0].B.is_meta:
            difference = layer_difference(adapters, name, basis_differences(pairs, side), TOLERANCE)
            if difference is not None:
                raise _differ(difference, first.component)
        if side == "output":
            return LowRank(pairs[0].B, _weighted([pair.A for pair in pairs], weights))
        return LowRank(_weighted([pair.B for pair in pairs], weights), pairs[0].A)

    layers = each_layer([adapter.layers for adapter in adapters], summed)
    header = merged_header(adapters, weights, "sum", rank=first.rank, keep_basis=True)
    return Adapter(layers, header, first.component)


def _differ(difference: str, component: Component) -> BasesDifferError:
    return BasesDifferError(
        f"method sum needs one basis, but {difference}; use concat, which is exact at the summed rank.", component
    )


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    merged = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    if merged.is_meta:
        return merged
    tensors = [tensor.detach() for tensor in tensors]
    if list(weights) == [1, 1]:
        # One sum of two values is rounded alike in fp32 and in fp64 and then to fp32, as 53 digits are over twice 24.
        return torch.add(*tensors, out=merged)
    target, parts = merged.view(-1), [tensor.reshape(-1) for tensor in tensors]
    size = min(_CHUNK, len(target))
    totals, wide = torch.empty(2, size, dtype=torch.float64)
    for start in range(0, len(target), size):
        here = slice(start, start + size)
        total, other = totals[: len(target[here])], wide[: len(target[here])]
        torch.mul(other.copy_(parts[0][here]), weights[0], out=total)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(other.copy_(part[here]), alpha=weight)
        target[here] = total
    return merged
