"""Updates of several adapters in one frame, and dense updates back as low-rank pairs. All in float64."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from qrlora.basis import Side, leading_subspace
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, LowRank
from qrlora.merging._checks import basis_difference
from qrlora.merging._header import merged_header

BASIS_TOLERANCE = 1e-5
_NEGLIGIBLE = 1e-12


def dense(pair: LowRank) -> Tensor:
    """`dW` as `[out, n]`."""
    return pair.B.flatten(1).double() @ pair.A.flatten(1).double()


def common_frame(pairs: Sequence[LowRank]) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal `U` `[out, k]` of what the updates write to, and each update's coordinates `[k, n]`: `dW_i = U C_i`.

    The columns of `U` are the left singular vectors of `[dW_1 ... dW_T]` in falling order; those of no weight are left
    out, so `k` is the rank of the whole. No dense update is formed.
    """
    linalg = cast(Any, torch.linalg)
    spread, core = cast(
        tuple[Tensor, Tensor], linalg.qr(torch.cat([pair.B.flatten(1).double() for pair in pairs], dim=1))
    )
    widths = [pair.rank for pair in pairs]
    cores = cast(tuple[Tensor, ...], cast(Any, core).split(widths, dim=1))
    parts = [columns @ pair.A.flatten(1).double() for columns, pair in zip(cores, pairs, strict=True)]
    turn, values, _ = cast(tuple[Tensor, Tensor, Tensor], linalg.svd(torch.cat(parts, dim=1), full_matrices=False))
    kept = max(1, int((values > _NEGLIGIBLE * values[0]).sum()))
    turn = turn[:, :kept]
    return spread @ turn, [turn.T @ part for part in parts]


def pair_of(left: Tensor, right: Tensor, like: LowRank) -> LowRank:
    """`left` `[out, k]` and `right` `[k, n]` as a pair for the weight that `like` adapts."""
    B = left.float().reshape(-1, left.shape[1], *like.B.shape[2:]).contiguous()
    return LowRank(B, right.float().reshape(-1, *like.A.shape[1:]).contiguous())


def shared_side(adapters: Sequence[Adapter], method: str) -> Side:
    """The side of the one stored basis that some adapters share.

    Raises:
        QrloraError: they share none.
    """
    difference = basis_difference(adapters, BASIS_TOLERANCE)
    header = adapters[0].header
    if difference is not None or header is None or header.side is None:
        raise QrloraError(f"method {method} on coefficients needs one basis, but {difference}; leave space at dense.")
    return header.side


def merged_coefficients(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    combine: Callable[[str, list[Tensor]], Tensor],
) -> Adapter:
    """A merge that acts on the coefficients alone: the rank and the basis stay.

    Args:
        adapters: of one stored basis.
        weights: for the header; `combine` applies them.
        method: its name.
        combine: a layer's name and the coefficients of all, `[r, n]` (side output) or `[out, r]`, to the merged ones.
    """
    on_output = shared_side(adapters, method) == "output"
    layers: dict[str, LowRank] = {}
    for name, pair in adapters[0].layers.items():
        pairs = [adapter.layers[name] for adapter in adapters]
        trained = [(each.A if on_output else each.B).flatten(1).double() for each in pairs]
        merged = combine(name, trained).float()
        layers[name] = (
            LowRank(pair.B, merged.reshape(pair.A.shape))
            if on_output
            else LowRank(merged.reshape(pair.B.shape), pair.A)
        )
    rank = max(pair.rank for pair in layers.values())
    header = merged_header(adapters, weights, method, rank=rank, keep_basis=True)
    return Adapter(layers, header, adapters[0].component)


def merged_dense(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    combine: Callable[[str, list[Tensor]], Tensor],
    rank: int | None,
) -> Adapter:
    """A merge that acts on dense updates, one layer at a time, and is brought back to a low rank.

    Args:
        adapters: of equal layers.
        weights: for the header; `combine` applies them.
        method: its name.
        combine: a layer's name and the dense updates `[out, n]` of all to the merged one.
        rank: of the result; the sum of the adapters' ranks where None. What is cut off is told in a `QrloraWarning`.
    """
    layers: dict[str, LowRank] = {}
    lost = total = 0.0
    for name, pair in adapters[0].layers.items():
        pairs = [adapter.layers[name] for adapter in adapters]
        merged = combine(name, [dense(each) for each in pairs])
        wanted = min(rank or sum(each.rank for each in pairs), *merged.shape)
        layers[name], error = truncated(merged, wanted, pair, name)
        lost, total = lost + error, total + float(merged.square().sum())
    return finished(layers, adapters, weights, method, (lost / total) ** 0.5 if total else 0.0)


def truncated(matrix: Tensor, rank: int, like: LowRank, layer: str) -> tuple[LowRank, float]:
    """The best pair of a rank for a dense update `[out, n]` (Eckart and Young 1936), and the squared norm cut off."""
    if not matrix.any():
        return pair_of(matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1]), like), 0.0
    left = leading_subspace(matrix, rank, layer=layer).vectors.to(matrix)
    right = left.T @ matrix
    cut = float(matrix.square().sum() - right.square().sum())
    return pair_of(left, right, like), max(cut, 0.0)


def finished(
    layers: Mapping[str, LowRank], adapters: Sequence[Adapter], weights: Sequence[float], method: str, error: float
) -> Adapter:
    """The merged adapter without a basis of its own; `error` relative to the whole update is told of if it matters."""
    rank = max(pair.rank for pair in layers.values())
    if error > 1e-6:
        warnings.warn(
            f"the merge by {method} was cut to rank {rank}, which leaves out {error:.2g} of its norm; a larger rank "
            "keeps more.",
            QrloraWarning,
            stacklevel=6,
        )
    header = merged_header(adapters, weights, method, rank=rank, keep_basis=False)
    return Adapter(layers, header, adapters[0].component)
