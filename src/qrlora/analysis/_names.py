"""Names of layers and of adapters as a person wants to see them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_CONTAINER = re.compile(r"(?:(mid_block)|(\w*(?:blocks|layers|attentions|resnets|samplers))\.(\d+))(?:\.|$)")
_SHORT = {
    "transformer_blocks": "block",
    "single_transformer_blocks": "single",
    "down_blocks": "down",
    "mid_block": "mid",
    "up_blocks": "up",
}
_FILES_OF_A_FOLDER = ("adapter", "adapter_model", "pytorch_lora_weights")
"""File names that tools give every adapter, so that the folder tells which it is."""
_FIRST_TO_LAST = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")


@dataclass(frozen=True)
class Place:
    """Where a layer is: its block (`single 3`, `down 1.0`), the block's group (`single`) and what follows."""

    group: str
    block: str
    module: str


def place_of(layer: str) -> Place | None:
    """The place of a layer by the names diffusers uses; None where its path names no numbered block."""
    containers: list[str] = []
    numbers: list[str] = []
    at = 0
    while (match := _CONTAINER.match(layer, at)) is not None:
        containers.append(match[1] or match[2])
        if match[3]:
            numbers.append(match[3])
        at = match.end()
    if not containers or at >= len(layer):
        return None
    group = _SHORT.get(containers[0], containers[0])
    return Place(group, f"{group} {'.'.join(numbers)}".strip(), layer[at:])


def model_order(layers: Sequence[str]) -> list[str]:
    """The layers as the model runs through them, by what diffusers' names tell: double before single blocks, block 2
    before block 10; unknown names after known ones."""
    return sorted(layers, key=_order)


def _order(layer: str) -> tuple[int, list[tuple[int, str]]]:
    first = layer.partition(".")[0]
    rank = _FIRST_TO_LAST.index(first) if first in _FIRST_TO_LAST else len(_FIRST_TO_LAST)
    return rank, [(int(part), "") if part.isdigit() else (-1, part) for part in layer.split(".")]


@dataclass(frozen=True)
class Grid:
    """Values of layers as a table of modules by blocks; None where a block has no such module."""

    modules: list[str]
    blocks: list[str]
    cells: list[list[float | None]]


def grid_of(values: Mapping[str, float]) -> Grid | None:
    """The values by module and block, in the model's order; None where the names show fewer than two blocks."""
    placed = {layer: place for layer in model_order(list(values)) if (place := place_of(layer)) is not None}
    blocks = list(dict.fromkeys(place.block for place in placed.values()))
    modules = list(dict.fromkeys(place.module for place in placed.values()))
    if len(blocks) < 2:
        return None
    cells: list[list[float | None]] = [[None] * len(blocks) for _ in modules]
    for layer, place in placed.items():
        cells[modules.index(place.module)][blocks.index(place.block)] = values[layer]
    return Grid(modules, blocks, cells)


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `dog` and `ink`, or `a/dog` and `b/dog`.

    A name that tools give every file (`adapter`) gives way to its folder's. The very same path twice is told apart by a
    number.
    """
    parts = [_telling(Path(path)) for path in paths]
    return numbered([_end(mine, [other for other in parts if other != mine]) for mine in parts])


def numbered(names: Sequence[str]) -> list[str]:
    """The names, those that were there already with a number: `dog`, `dog (2)`."""
    found: list[str] = []
    for name in names:
        same = names[: len(found)].count(name)
        found.append(f"{name} ({same + 1})" if same else name)
    return found


def _telling(path: Path) -> tuple[str, ...]:
    parts = (*path.parts[:-1], path.name.removesuffix(".safetensors"))
    return parts[:-1] if len(parts) > 1 and parts[-1] in _FILES_OF_A_FOLDER else parts


def _end(mine: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    lengths = range(1, len(mine))
    enough = (length for length in lengths if all(other[-length:] != mine[-length:] for other in others))
    return "/".join(mine[-next(enough, len(mine)) :])
