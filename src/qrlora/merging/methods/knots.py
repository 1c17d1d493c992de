"""KnOTS: merge in the common space of all updates (arXiv 2410.19735)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qrlora.formats import Adapter, LowRank
from qrlora.merging._frames import common_frame, finished, pair_of
from qrlora.merging._registry import register_merge
from qrlora.merging.methods.ties import check_density, vote


@register_merge("knots")
def merge_knots(
    adapters: Sequence[Adapter], weights: Sequence[float], *, density: float = 0.2, scale: float = 1.0
) -> Adapter:
    """`[dW_1 ... dW_T] = U S [V_1 ... V_T]`; TIES on the blocks `S V_i`, with one trimming over all layers; times U.

    The updates are aligned before they vote, so entries that are compared mean the same direction. The rank is that of
    all updates together: r where they share a basis. No dense update is formed.

    Args:
        adapters: of equal layers.
        weights: one an adapter, applied after the vote.
        density: the share of each adapter's entries that is kept, in (0, 1].
        scale: of the merged update; the paper's are 0.5 to 0.7 for many tasks.

    Raises:
        QrloraError: a density outside (0, 1].
    """
    check_density(density)
    frames = {name: common_frame([adapter.layers[name] for adapter in adapters]) for name in adapters[0].layers}
    limits = [_threshold([parts[index] for _, parts in frames.values()], density) for index in range(len(adapters))]
    layers: dict[str, LowRank] = {}
    for name, (spread, parts) in frames.items():
        trimmed = [torch.where(part.abs() >= limit, part, 0.0) for part, limit in zip(parts, limits, strict=True)]
        layers[name] = pair_of(spread, scale * vote(trimmed, weights), adapters[0].layers[name])
    return finished(layers, adapters, weights, "knots", 0.0)


def _threshold(parts: Sequence[Tensor], density: float) -> float:
    """The magnitude of the last entry that is kept of one adapter, over all layers."""
    entries = torch.cat([part.flatten() for part in parts]).abs()
    return float(entries.topk(max(1, int(density * len(entries)))).values[-1])
