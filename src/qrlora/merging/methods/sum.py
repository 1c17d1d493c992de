"""The exact merge of adapters that share one stored basis: the trained factors are summed, the rank stays."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank
from qrlora.merging._checks import basis_difference
from qrlora.merging._header import merged_header
from qrlora.merging._registry import register_merge

TOLERANCE = 1e-5


@register_merge("sum")
def merge_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """`Q (sum_i w_i dR_i)`: exact at rank r, summed in float64.

    Raises:
        QrloraError: the stored bases differ by more than 1e-5 relative in some layer.
    """
    difference = basis_difference(adapters, TOLERANCE)
    first = adapters[0]
    if difference is not None or first.header is None:
        raise QrloraError(
            f"method sum needs one basis, but {difference}; use concat, which is exact at the summed rank."
        )
    on_output = first.header.side == "output"
    layers: dict[str, LowRank] = {}
    for name, pair in first.layers.items():
        pairs = [adapter.layers[name] for adapter in adapters]
        if on_output:
            layers[name] = LowRank(pair.B, _weighted([each.A for each in pairs], weights))
        else:
            layers[name] = LowRank(_weighted([each.B for each in pairs], weights), pair.A)
    rank = max(pair.rank for pair in layers.values())
    header = merged_header(adapters, weights, "sum", rank=rank, keep_basis=True)
    return Adapter(layers, header, first.component)


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.double()
    return total.float()
