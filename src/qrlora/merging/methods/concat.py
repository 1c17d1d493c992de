"""The exact merge of adapters with bases of their own: factors side by side, the ranks add up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qrlora.formats import Adapter, LowRank, each_layer, shapes_of
from qrlora.merging._header import merged_header
from qrlora.merging._registry import register_merge


@register_merge("concat")
def merge_concat(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """`[B_1 ... B_n] [w_1 A_1; ...; w_n A_n]`: exact for any adapters of the same layers, at the summed rank.

    The weights go into each part's trained factor, so its basis is stored unchanged.
    """
    scaled = [adapter.scaled(weight) for adapter, weight in zip(adapters, weights, strict=True)]
    layers = each_layer([adapter.layers for adapter in scaled], _side_by_side)
    rank = max(pair.rank for pair in shapes_of(layers).values())
    header = merged_header(adapters, weights, "concat", rank=rank, keep_basis=False)
    return Adapter(layers, header, adapters[0].component)


def _side_by_side(_name: str, pairs: Sequence[LowRank]) -> LowRank:
    return LowRank(_joined([pair.B for pair in pairs], 1), _joined([pair.A for pair in pairs], 0))


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    if not tensors[0].is_meta:
        return torch.cat(list(tensors), dim)
    # torch's own cat of tensors without values takes longer than of those with them.
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return tensors[0].new_empty(shape)
