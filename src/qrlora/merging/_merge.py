"""Adapters into one adapter."""

import warnings
from collections.abc import Sequence
from typing import Any

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter
from qrlora.formats._adapter import check_weight
from qrlora.merging._checks import basis_difference, check_compatible
from qrlora.merging._registry import run

BASIS_TOLERANCE = 1e-5


def merge(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, method: str = "auto", **options: Any
) -> Adapter:
    """Merge any number of adapters of one base model, `dW = sum_i weights[i] * dW_i`.

    Args:
        adapters: at least one; all of the same layers.
        weights: one finite number an adapter, any sign; all 1 where None.
        method: "sum" (one stored basis: exact at rank r), "concat" (any bases: exact at the summed rank), another
            registered method, or "auto": sum if the stored bases agree to 1e-5, otherwise concat, with a
            `QrloraWarning`.
        **options: options of the method.

    Returns:
        The merged adapter; its header's `method` says how it was made and `merged_from` from what.

    Raises:
        QrloraError: different layers or base models, values that are not finite, an explicit sum of different bases, an
            unknown method or option; naming the layer.
    """
    if not adapters:
        raise QrloraError("there is nothing to merge; give at least one adapter.")
    used = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(used) != len(adapters):
        raise QrloraError(f"{len(adapters)} adapters but {len(used)} weights; give one weight an adapter.")
    for weight in used:
        check_weight(weight)
    check_compatible(adapters)
    return run(_choose(adapters) if method == "auto" else method, adapters, used, options)


def _choose(adapters: Sequence[Adapter]) -> str:
    difference = basis_difference(adapters, BASIS_TOLERANCE)
    if difference is None:
        return "sum"
    if len(adapters) > 1:
        ranks = [max(pair.rank for pair in adapter.layers.values()) for adapter in adapters]
        warnings.warn(
            f"{difference}, so the adapters are concatenated: exact, at rank {' + '.join(map(str, ranks))} = "
            f"{sum(ranks)}.",
            QrloraWarning,
            stacklevel=3,
        )
    return "concat"
