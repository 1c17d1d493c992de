"""The sum at a chosen rank: exact concatenation, then the best approximation."""

from collections.abc import Sequence

from qrlora.formats import Adapter
from qrlora.merging._frames import finished
from qrlora.merging._refactor import refactor
from qrlora.merging._registry import register_merge
from qrlora.merging.methods.concat import merge_concat


@register_merge("svd")
def merge_svd(adapters: Sequence[Adapter], weights: Sequence[float], *, rank: int | None = None) -> Adapter:
    """The best approximation of `sum_i w_i dW_i` at a rank, in every layer (Eckart and Young 1936).

    Args:
        adapters: of equal layers.
        weights: one an adapter.
        rank: of the result; the largest of the adapters' ranks where None. What is cut off is told.
    """
    wanted = rank or max(adapter.rank for adapter in adapters)
    merged, error = refactor(merge_concat(adapters, weights), wanted)
    return finished(merged.layers, adapters, weights, "svd", error)
