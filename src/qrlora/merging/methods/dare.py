"""DARE: drop entries at random and rescale the rest (arXiv 2311.03099), then sum, or vote as TIES does."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from qrlora.formats import Adapter
from qrlora.merging._frames import merged_coefficients, merged_dense
from qrlora.merging._registry import register_merge
from qrlora.merging.methods.ties import Space, check_density, check_space, vote


@register_merge("dare")
def merge_dare(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    elect_sign: bool = False,
    seed: int = 0,
    space: Space = "dense",
    rank: int | None = None,
) -> Adapter:
    """Keep each entry with probability `density`, divided by it, so that the mean over seeds is the plain sum.

    The masks are a function of seed, layer and the adapter's place alone.

    Args:
        adapters: of equal layers.
        weights: one an adapter.
        density: the probability to keep an entry, in (0, 1].
        elect_sign: merge what is left as TIES does, instead of summing it.
        seed: of the masks.
        space: "dense", or "coefficients" of one shared basis, which keeps rank and basis.
        rank: of a dense result; the sum of the ranks where None. Random masks leave no low rank: much is cut off.

    Raises:
        QrloraError: a density outside (0, 1], an unknown space, or coefficients without one basis.
    """
    check_density(density)
    check_space(space, rank, "dare")

    def combine(name: str, updates: list[Tensor]) -> Tensor:
        kept = [_dropped(update, density, (seed, name, index)) for index, update in enumerate(updates)]
        if elect_sign:
            return vote(kept, weights)
        return torch.stack([weight * update for weight, update in zip(weights, kept, strict=True)]).sum(dim=0)

    if space == "coefficients":
        return merged_coefficients(adapters, weights, "dare", combine)
    return merged_dense(adapters, weights, "dare", combine, rank)


def _dropped(update: Tensor, density: float, key: tuple[int, str, int]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1
    drawn = torch.rand(update.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(drawn < density, update / density, 0.0)
