"""One look at all values of the adapters that are to be merged, layer by layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from qrlora.adapter import by_layer
from qrlora.errors import QrloraError
from qrlora.formats import TEXT_ENCODERS, Adapter, Component, LowRank
from qrlora.merging._checks import basis_differences, common_side, companions_of, name_of
from qrlora.merging._norms import squared_norm


@dataclass(frozen=True)
class Survey:
    """What is known of the values.

    Attributes:
        norms: of each adapter's whole update, companions included; as `update_norm`.
        bases: by component and layer, how far the bases of the adapters that have it are from the first one's; without
            the layers where not all of them have a basis on one side.
    """

    norms: list[float]
    bases: Mapping[Component, Mapping[str, list[float]]]


def surveyed(adapters: Sequence[Adapter]) -> Survey:
    """Look at every layer of compatible adapters once.

    Files are read once for that, and one layer is held at a time for each of torch's threads, which share the work.

    Raises:
        QrloraError: a value that is not finite, naming the adapter and the layer.
    """
    totals = [0.0] * len(adapters)
    bases: dict[Component, dict[str, list[float]]] = {}
    first = adapters[0].component
    components: list[Component] = [first, *(each for each in TEXT_ENCODERS if each != first)]
    for component in components:
        parts = _named(adapters) if component == first else companions_of(adapters, component)
        bases[component] = {}
        layers = list(dict.fromkeys(name for part in parts.values() for name in part.layers))
        for layer, (norms, differences) in zip(layers, by_layer(partial(_looked_at, parts), layers), strict=True):
            for index, norm in norms.items():
                totals[index] += norm
            if differences is not None:
                bases[component][layer] = differences
    return Survey([math.sqrt(max(0.0, total)) for total in totals], bases)


def _named(adapters: Sequence[Adapter]) -> dict[int, Adapter]:
    return {index: replace(adapter, source=name_of(adapters, index)) for index, adapter in enumerate(adapters)}


def _looked_at(parts: Mapping[int, Adapter], layer: str) -> tuple[dict[int, float], list[float] | None]:
    """The squared norms of one layer by adapter, and how far the bases are from the first one's where all have one."""
    owners = {index: part for index, part in parts.items() if layer in part.layers}
    pairs = {index: part.layers[layer] for index, part in owners.items()}
    norms = {index: squared_norm(pair) for index, pair in pairs.items()}
    for index, norm in norms.items():
        if not math.isfinite(norm):
            _check_finite(owners[index].label, layer, pairs[index])
    side, _ = common_side(list(owners.values()))
    return norms, None if side is None else basis_differences(list(pairs.values()), side)


def _check_finite(label: str, layer: str, pair: LowRank) -> None:
    if not (bool(torch.isfinite(pair.A).all()) and bool(torch.isfinite(pair.B).all())):
        raise QrloraError(f"{label}: {layer} has values that are not finite (nan or inf); it cannot be merged.")
