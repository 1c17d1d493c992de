"""How strong adapters are beside each other. A merge of unequal norms is the commonest failure: one part vanishes."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, LowRank
from qrlora.merging._checks import name_of

NORM_RATIO_LIMIT = 3.0
"""Above this ratio of the largest to the smallest norm times weight the weaker adapter has less than a tenth of the
squared norm of the two, and `merge` warns."""


class NormWarning(QrloraWarning):
    """Of adapters so unequal in norm that one will hardly show."""


def update_norm(adapter: Adapter, layers: Iterable[str] | None = None) -> float:
    """The Frobenius norm of the whole update, `sqrt(sum_l ||B_l A_l||_F^2)`, in float64; companions belong to it.

    From the factors, `||B A||_F^2 = tr((B^T B)(A A^T))`; no dense update is formed.

    Args:
        adapter: any.
        layers: those to count, without companions; all where None.
    """
    total = 0.0
    for layer in adapter.layers if layers is None else layers:
        total += squared_norm(adapter.layers[layer])
    if layers is None:
        total += sum(update_norm(companion) ** 2 for companion in adapter.companions.values())
    return math.sqrt(max(0.0, total))


def squared_norm(pair: LowRank) -> float:
    """`||B A||_F^2` in float64, not finite where a value is not."""
    return squared_norms([pair])[0]


def squared_norms(pairs: Sequence[LowRank]) -> list[float]:
    """`squared_norm` of each pair; what one tensor gives is worked out once, however many have it."""
    of_B: dict[int, Tensor] = {}
    of_A: dict[int, Tensor] = {}
    for pair in pairs:
        if id(pair.B) not in of_B:
            of_B[id(pair.B)] = _gram(pair.B.detach().flatten(1))
        if id(pair.A) not in of_A:
            of_A[id(pair.A)] = _gram(pair.A.detach().flatten(1).T)
    return [float(torch.sum(of_B[id(pair.B)] * of_A[id(pair.A)])) for pair in pairs]


def _gram(columns: Tensor) -> Tensor:
    """`X^T X` of `X [d, r]` in float64; copies of a few rows stay in the cache, and need no fresh memory."""
    total = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64)
    for start in range(0, len(columns), 512):
        wide = columns[start : start + 512].double()
        total.addmm_(wide.T, wide)
    return total


def norm_ratio(sizes: Iterable[float]) -> float | None:
    """Largest to smallest of the sizes that are not 0; None where fewer than two are left."""
    left = [abs(size) for size in sizes if size]
    return max(left) / min(left) if len(left) > 1 else None


def norm_warnings(adapters: Sequence[Adapter], weights: Sequence[float], norms: Sequence[float]) -> list[QrloraWarning]:
    """Of each adapter without any update, and of a ratio of norm times weight above `NORM_RATIO_LIMIT`."""
    sizes = [abs(weight) * norm for weight, norm in zip(weights, norms, strict=True)]
    told: list[QrloraWarning] = [
        NormWarning(f"the update of {name_of(adapters, index)} is zero, so it adds nothing to the merge.")
        for index, norm in enumerate(norms)
        if not norm
    ]
    ratio = norm_ratio(sizes)
    if ratio is None or ratio <= NORM_RATIO_LIMIT:
        return told
    strong = sizes.index(max(sizes))
    weak = sizes.index(min(size for size in sizes if size))
    words = (
        f"{name_of(adapters, strong)} is {ratio:.3g} times as strong as {name_of(adapters, weak)} (norm times weight), "
        "which will hardly show; merge with normalize, or give it a larger weight."
    )
    return [*told, NormWarning(words)]


def equal_norm_scales(adapters: Sequence[Adapter], norms: Sequence[float]) -> list[float]:
    """One factor an adapter that brings its norm to the geometric mean of all norms.

    Raises:
        QrloraError: an update is zero.
    """
    for index, norm in enumerate(norms):
        if not norm:
            raise QrloraError(
                f"the update of {name_of(adapters, index)} is zero, so no factor gives it the norm of the others; "
                "leave it out, or merge without normalize."
            )
    mean = math.exp(math.fsum(map(math.log, norms)) / len(norms))
    return [mean / norm for norm in norms]
