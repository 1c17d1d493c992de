"""Later adapters without what the first ones read: content first, then style."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank
from qrlora.merging._checks import basis_difference
from qrlora.merging._frames import BASIS_TOLERANCE
from qrlora.merging._norms import update_norm
from qrlora.merging._registry import register_merge, run


@register_merge("orthogonal")
def merge_orthogonal(
    adapters: Sequence[Adapter], weights: Sequence[float], *, strength: float = 1.0, energy: float = 1.0
) -> Adapter:
    """Remove from each adapter the input directions of those before it, then merge exactly.

    `A_i <- A_i (I - strength V V^T)`, where the columns of V span the row space of the earlier updates: what the
    content reacts to, the style no longer changes. The basis and the rank of an adapter stay.

    Args:
        adapters: of equal layers, the one that is kept whole first.
        weights: one an adapter.
        strength: how much is removed: 1 all, 0 nothing.
        energy: V holds the leading directions with this share of the earlier updates' squared norm, in (0, 1].

    Raises:
        QrloraError: a strength outside [0, 1], an energy outside (0, 1], or an adapter of which nothing is left, as
            with bases on the input side that are one.
    """
    if not 0 <= strength <= 1:
        raise QrloraError(f"strength={strength} must lie from 0 (nothing is removed) to 1 (all of it).")
    if not 0 < energy <= 1:
        raise QrloraError(f"energy={energy} is no share; give a number above 0, at most 1.")
    cleaned = [dict(adapter.layers) for adapter in adapters]
    for name in adapters[0].layers:
        pairs = [adapter.layers[name] for adapter in adapters]
        for index in range(1, len(pairs)):
            rows = _leading_rows(pairs[:index], energy)
            A = pairs[index].A.flatten(1).double()
            left = (A - strength * (A @ rows) @ rows.T).float().reshape(pairs[index].A.shape)
            cleaned[index][name] = LowRank(pairs[index].B, left)
    parts = [
        Adapter(layers, adapter.header, adapter.component, source=adapter.source)
        for layers, adapter in zip(cleaned, adapters, strict=True)
    ]
    for before, after in zip(adapters, parts, strict=True):
        _check_left(before, after)
    summed = basis_difference(parts, BASIS_TOLERANCE) is None
    merged = run("sum" if summed else "concat", parts, weights, {})
    assert merged.header is not None
    header = merged.header.model_copy(update={"method": "orthogonal"})
    return Adapter(merged.layers, header, merged.component)


def _leading_rows(pairs: Sequence[LowRank], energy: float) -> Tensor:
    """Orthonormal `[n, k]`: leading right singular vectors of the stacked updates, up to a share of their energy."""
    linalg = cast(Any, torch.linalg)
    cores = [linalg.qr(pair.B.flatten(1).double())[1] @ pair.A.flatten(1).double() for pair in pairs]
    _, values, rows = cast(tuple[Tensor, Tensor, Tensor], linalg.svd(torch.cat(cores), full_matrices=False))
    shares = values.square().cumsum(0) / values.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    needed = int((shares < energy * (1 - 1e-12)).sum()) + 1
    kept = min(needed, int((values > 1e-9 * values[0]).sum()))
    return rows[:kept].T


def _check_left(before: Adapter, after: Adapter) -> None:
    norm = update_norm(before)
    if norm and update_norm(after) < 1e-6 * norm:
        raise QrloraError(
            f"{before.label} reads only what the adapters before it read, so nothing of it would be left; give a lower "
            "strength or energy, or another method."
        )
