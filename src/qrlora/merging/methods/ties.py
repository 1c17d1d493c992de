"""TIES: trim, elect signs, merge what agrees (arXiv 2306.01708), by peft's own function on the updates themselves."""

from collections.abc import Sequence
from typing import Literal

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, magnitude_based_pruning
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats import Adapter
from qrlora.merging._frames import merged_coefficients, merged_dense
from qrlora.merging._registry import register_merge

Space = Literal["dense", "coefficients"]


@register_merge("ties")
def merge_ties(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    space: Space = "dense",
    rank: int | None = None,
) -> Adapter:
    """Keep the largest entries of each update, elect a sign by their sum, average those that agree with it.

    peft's merge of this name works on A and B apart, which is another thing: products of one adapter's A and another's
    B appear. Here it works on dW, layer by layer, or on the coefficients of one shared basis.

    Args:
        adapters: of equal layers.
        weights: one an adapter, applied after the vote.
        density: the share of entries that is kept, in (0, 1].
        space: "dense", as published, or "coefficients": cheap, keeps rank and basis, but depends on the basis.
        rank: of a dense result; the sum of the ranks where None.

    Raises:
        QrloraError: a density outside (0, 1], an unknown space, or coefficients without one basis.
    """
    check_density(density)
    check_space(space, rank, "ties")

    def combine(name: str, updates: list[Tensor]) -> Tensor:
        return vote([magnitude_based_pruning(update, density) for update in updates], weights)

    if space == "coefficients":
        return merged_coefficients(adapters, weights, "ties", combine)
    return merged_dense(adapters, weights, "ties", combine, rank)


def vote(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean, over the updates that agree with the sign of their sum, of the weighted entries; zeros never agree."""
    stacked = torch.stack(list(updates))
    factors = torch.tensor(list(weights), dtype=stacked.dtype).reshape(-1, *(1 for _ in stacked.shape[1:]))
    return disjoint_merge(stacked * factors, calculate_majority_sign_mask(stacked))


def check_density(density: float) -> None:
    """Refuse a share of entries outside (0, 1]."""
    if not 0 < density <= 1:
        raise QrloraError(f"density={density} is no share of the entries; give a number above 0, at most 1.")


def check_space(space: str, rank: int | None, method: str) -> None:
    """Refuse an unknown space, and a rank where it follows from the space."""
    if space not in ("dense", "coefficients"):
        raise QrloraError(f"space={space!r} is not known to {method}; it is dense or coefficients.")
    if space == "coefficients" and rank is not None:
        raise QrloraError(f"rank={rank} means nothing to {method} on coefficients, which keeps the rank; drop one.")
