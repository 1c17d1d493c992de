"""One look at all values of the adapters that are to be merged, layer by layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qrlora.adapter import by_layer
from qrlora.errors import QrloraError
from qrlora.formats import TEXT_ENCODERS, Adapter, Component, LayersOnDemand, LowRank
from qrlora.merging._checks import basis_differences, common_side, companions_of, name_of
from qrlora.merging._norms import squared_norms


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
    squares: list[list[float]] = [[] for _ in adapters]
    bases: dict[Component, dict[str, list[float]]] = {}
    for component, parts in _by_component(adapters):
        bases[component] = {}
        layers = list(dict.fromkeys(name for part in parts.values() for name in part.layers))
        for layer, (norms, differences) in zip(layers, by_layer(partial(_looked_at, parts), layers), strict=True):
            for index, norm in norms.items():
                squares[index].append(norm)
            if differences is not None:
                bases[component][layer] = differences
    return Survey([_root(found) for found in squares], bases)


class Watched:
    """Adapters that are looked at while they are read, for what asks for each layer of all of them in turn.

    Attributes:
        adapters: equal to those given. A layer's values are checked, as by `surveyed`, when it is asked for.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._watches = {component: _Watch(parts) for component, parts in _by_component(adapters)}
        self.adapters = [self._watched(index, adapter) for index, adapter in enumerate(adapters)]

    @property
    def norms(self) -> list[float]:
        """Of each adapter's whole update, as `update_norm`, once all layers were asked for."""
        watches = self._watches.values()
        return [_root([each for watch in watches for each in watch.squares(i)]) for i in range(len(self.adapters))]

    def _watched(self, index: int, adapter: Adapter) -> Adapter:
        companions = {
            component: replace(part, layers=self._watches[component].layers(index))
            for component, part in adapter.companions.items()
        }
        return replace(adapter, layers=self._watches[adapter.component].layers(index), companions=companions)


class _Watch:
    """What one component's layers are read through; the latest layer is held for all adapters."""

    def __init__(self, parts: Mapping[int, Adapter]) -> None:
        self._parts = parts
        self._squares: dict[tuple[int, str], float] = {}
        self._latest: tuple[str, dict[int, LowRank]] | None = None

    def layers(self, index: int) -> Mapping[str, LowRank]:
        return LayersOnDemand(self._parts[index].shapes, partial(self._read, index))

    def squares(self, index: int) -> list[float]:
        """The squared norms of an adapter's layers, all of which were asked for."""
        return [self._squares[index, layer] for layer in self._parts[index].layers] if index in self._parts else []

    def _read(self, index: int, layer: str) -> LowRank:
        latest = self._latest
        if latest is None or latest[0] != layer:
            self._latest = latest = None  # given up before more is read
            pairs = _pairs(self._parts, layer)
            for each, square in _checked_squares(self._parts, layer, pairs).items():
                self._squares[each, layer] = square
            self._latest = latest = layer, pairs
        return latest[1][index]


def _by_component(adapters: Sequence[Adapter]) -> Iterator[tuple[Component, dict[int, Adapter]]]:
    """The adapters' parts by index for each component, the denoiser's first, as messages call them."""
    first = adapters[0].component
    yield first, {index: replace(adapter, source=name_of(adapters, index)) for index, adapter in enumerate(adapters)}
    for component in TEXT_ENCODERS:
        if component != first:
            yield component, companions_of(adapters, component)


def _looked_at(parts: Mapping[int, Adapter], layer: str) -> tuple[dict[int, float], list[float] | None]:
    """The squared norms of one layer by adapter, and how far the bases are from the first one's where all have one."""
    pairs = _pairs(parts, layer)
    norms = _checked_squares(parts, layer, pairs)
    side, _ = common_side([parts[index] for index in pairs])
    return norms, None if side is None else basis_differences(list(pairs.values()), side)


def _pairs(parts: Mapping[int, Adapter], layer: str) -> dict[int, LowRank]:
    """The pairs of those that have the layer; a factor that has the first one's bits is the first one's own tensor, so
    that it is held, and looked at, once."""
    found: dict[int, LowRank] = {}
    for index, part in parts.items():
        if layer in part.layers:
            pair = part.layers[layer]
            first = next(iter(found.values()), pair)
            found[index] = LowRank(_one_of(first.B, pair.B), _one_of(first.A, pair.A))
    return found


def _one_of(first: Tensor, other: Tensor) -> Tensor:
    if not (first.dtype == other.dtype == torch.float32 and first.shape == other.shape):
        return other
    # As integers, so that 0 is not -0.
    return first if torch.equal(first.view(torch.int32), other.view(torch.int32)) else other


def _checked_squares(parts: Mapping[int, Adapter], layer: str, pairs: Mapping[int, LowRank]) -> dict[int, float]:
    squares = dict(zip(pairs, squared_norms(list(pairs.values())), strict=True))
    for index, square in squares.items():
        pair = pairs[index]
        if not math.isfinite(square) and not (torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all()):
            raise QrloraError(
                f"{parts[index].label}: {layer} has values that are not finite (nan or inf); it cannot be merged."
            )
    return squares


def _root(squares: Sequence[float]) -> float:
    # Exact sums, so that the order in which layers were looked at is not seen.
    return math.sqrt(max(0.0, math.fsum(squares)))
