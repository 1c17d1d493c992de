"""LoRA-LEGO: ranks as bricks, clustered and rebuilt (arXiv 2409.16167)."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank
from qrlora.merging._frames import common_frame, finished, pair_of
from qrlora.merging._registry import register_merge


@register_merge("lego")
def merge_lego(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    clusters: int | None = None,
    steps: int = 10,
    seed: int = 0,
) -> Adapter:
    """Gather alike units of all adapters and put one in the place of each group.

    A unit is a row of A with its column of B, here those of the balanced SVD of `w_i dW_i`, so that the result is a
    function of the updates and not of how their factors are written. k-means (Lloyd) groups the units by the directions
    `(a/|a|, b/|b|)`, where `(-a, -b)` is the same unit as `(a, b)`. A group's unit is the mean of its members, scaled
    so that its largest entry is the mean of theirs; the whole is multiplied by `sqrt(r / clusters)`, r being the
    largest rank that came in. A unit alone in its group stays as it is, and alike units are averaged, not added.

    The paper tells the idea; the features, the largest entry as norm and the ten steps are those of a reimplementation,
    the SVD, the signs and the start (k-means++, seeded by `seed` and the layer) are ours.

    Args:
        adapters: of equal layers.
        weights: one an adapter; both halves of its units are scaled by `sqrt|w|`, and one turned round where w < 0.
        clusters: how many units the result has in each layer, where there are so many; the largest rank where None.
        steps: of Lloyd's iteration at most.
        seed: of the start.

    Raises:
        QrloraError: fewer than one cluster, or a negative number of steps.
    """
    if clusters is not None and clusters < 1:
        raise QrloraError(f"clusters={clusters} is no number of clusters; give 1 or more.")
    if steps < 0:
        raise QrloraError(f"steps={steps} is no number of steps; give 0 or more.")
    layers: dict[str, LowRank] = {}
    for name, like in adapters[0].layers.items():
        pairs = [adapter.layers[name] for adapter in adapters]
        rank = max(pair.rank for pair in pairs)
        wanted = clusters or rank
        rows, columns = _units(pairs, weights)
        if len(rows):
            rows, columns = _rebuilt(rows, columns, _clustered(rows, columns, wanted, steps, f"{seed} {name}"))
        else:  # no update at all
            rows, columns = rows.new_zeros(1, rows.shape[1]), columns.new_zeros(1, columns.shape[1])
        layers[name] = pair_of((rank / wanted) ** 0.5 * columns.T, rows, like)
    return finished(layers, adapters, weights, "lego", 0.0)


def _units(pairs: Sequence[LowRank], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The units of all, `[N, n]` and `[N, out]`, of equal norms `sqrt(w S_k)` in both; those of no norm left out.

    The largest entry of a column is positive: of two adapters' alike units an SVD may turn one round.
    """
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for pair, weight in zip(pairs, weights, strict=True):
        left, (coordinates,) = common_frame([pair])
        values = _lengths(coordinates)[:, 0]
        present = (values > 0) & (weight != 0)
        root = (abs(weight) / values[present]).sqrt()[:, None]
        column = left.T[present]
        sign = column.gather(1, column.abs().argmax(dim=1, keepdim=True)).sign()
        rows.append(sign * root * coordinates[present] * (1 if weight > 0 else -1))
        columns.append(sign * root * values[present, None] * column)
    return torch.cat(rows), torch.cat(columns)


def _clustered(A: Tensor, B: Tensor, clusters: int, steps: int, key: str) -> Tensor:
    """`[K, N]`: 1 or -1 where a unit belongs to a cluster, by the sign it has there, else 0; no cluster is empty."""
    features = torch.cat([_directions(A), _directions(B)], dim=1)
    centres = _spread(features, clusters, key)
    members = _nearest(features, centres)
    for _ in range(steps):
        sizes = members.abs().sum(dim=1, keepdim=True)
        centres = torch.where(sizes > 0, members @ features / sizes.clamp(min=1), centres)
        before, members = members, _nearest(features, centres)
        if torch.equal(before, members):
            break
    return members[members.any(dim=1)]


def _directions(vectors: Tensor) -> Tensor:
    return vectors / _lengths(vectors)


def _lengths(vectors: Tensor) -> Tensor:
    return vectors.square().sum(dim=1, keepdim=True).sqrt()


def _nearest(features: Tensor, centres: Tensor) -> Tensor:
    """`[K, N]`: the sign of each unit at the centre that it, or its opposite, is nearest to."""
    products = centres @ features.T
    distances = centres.square().sum(dim=1, keepdim=True) - 2 * products.abs()  # up to each unit's own square
    # Units of one adapter are orthogonal: rounding is not to decide between what is equally near.
    chosen = distances.round(decimals=9).argmin(dim=0, keepdim=True)
    signs = torch.where(products.gather(0, chosen) < -1e-9, -1.0, 1.0).to(features)
    return torch.zeros_like(products).scatter_(0, chosen, signs)


def _spread(features: Tensor, clusters: int, key: str) -> Tensor:
    """Units to start from, `[K, d]`, drawn by their squared distance to those drawn before (k-means++)."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1
    generator = torch.Generator().manual_seed(seed)
    centres = features.new_zeros(0, features.shape[1])
    left = features.new_ones(len(features))
    while len(centres) < clusters and bool((left > 1e-9).any()):
        drawn = torch.multinomial(left.clamp(min=0), 1, generator=generator)
        centres = torch.cat([centres, features[drawn]])
        left = torch.minimum(left, 4 - 2 * (features @ features[int(drawn)]).abs())
        left = torch.where(left > 1e-9, left, 0.0)
    return centres


def _rebuilt(A: Tensor, B: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """One unit a cluster: the mean of its members in their signs, as large as they are on average."""
    sizes = members.abs().sum(dim=1, keepdim=True)
    a, b = members @ A / sizes, members @ B / sizes
    peaks = torch.maximum(A.abs().amax(dim=1), B.abs().amax(dim=1))
    wanted = members.abs() @ peaks / sizes[:, 0]
    found = torch.maximum(a.abs().amax(dim=1), b.abs().amax(dim=1))
    scale = torch.where(found > 0, wanted / found.clamp(min=torch.finfo(found.dtype).tiny), 0.0)[:, None]
    return a * scale, b * scale
