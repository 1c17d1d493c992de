"""Layers of adapters that are read or computed when they are asked for, and not kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrlora.formats._adapter import LowRank


class LayersOnDemand(Mapping[str, "LowRank"]):
    """Pairs by layer whose shapes are known, and whose values are made each time one is asked for.

    So whatever goes through an adapter layer by layer (a merge, a file being written) holds one layer at a time.

    Attributes:
        shapes: the pairs by layer, on the meta device: shapes and ranks without values.
    """

    def __init__(self, shapes: "Mapping[str, LowRank]", make: "Callable[[str], LowRank]") -> None:
        self.shapes = shapes
        self._make = make

    def __getitem__(self, name: str) -> "LowRank":
        if name not in self.shapes:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(layers: "Mapping[str, LowRank]") -> "Mapping[str, LowRank]":
    """Pairs with these layers' shapes and ranks, whose values are not to be looked at; nothing is read."""
    return layers.shapes if isinstance(layers, LayersOnDemand) else layers


def some_layers(layers: "Mapping[str, LowRank]", names: Iterable[str]) -> "Mapping[str, LowRank]":
    """The layers of these names, in their order."""
    if isinstance(layers, LayersOnDemand):
        return LayersOnDemand({name: layers.shapes[name] for name in names}, layers.__getitem__)
    return {name: layers[name] for name in names}


def all_layers(parts: "Sequence[Mapping[str, LowRank]]") -> "Mapping[str, LowRank]":
    """The layers of parts that have none in common."""
    owners = {name: part for part in parts for name in part}
    if any(isinstance(part, LayersOnDemand) for part in parts):
        return LayersOnDemand(
            {name: shapes_of(part)[name] for name, part in owners.items()}, lambda name: owners[name][name]
        )
    return {name: part[name] for name, part in owners.items()}


def each_layer(
    parts: "Sequence[Mapping[str, LowRank]]", combine: "Callable[[str, list[LowRank]], LowRank]"
) -> "Mapping[str, LowRank]":
    """One pair for each layer of the first part, from those that all parts have of it.

    Where a part has layers on demand, the result is on demand too, and `combine` is first called with pairs on the meta
    device, to know the shapes: what it does may depend on shapes, but not on values.

    Args:
        parts: pairs by layer, of equal layers.
        combine: a layer's name and its pairs, one a part, to one pair.
    """

    def made(name: str) -> "LowRank":
        return combine(name, [part[name] for part in parts])

    if any(isinstance(part, LayersOnDemand) for part in parts):
        shapes = [shapes_of(part) for part in parts]
        return LayersOnDemand({name: combine(name, [blank(each[name]) for each in shapes]) for name in parts[0]}, made)
    return {name: made(name) for name in parts[0]}


def blank(pair: "LowRank") -> "LowRank":
    """A pair of these shapes without values."""
    return type(pair)(pair.B.to("meta"), pair.A.to("meta"))
