"""Key tables as data: the names that a model's original code gives its layers, and the diffusers layers they hold.

A table is a list of entries. An entry's original layer holds one diffusers layer, or several whose outputs it computes
at once (a fused layer, whose weight is theirs stacked by rows).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qrlora.formats._adapter import Component

Swap = Literal["never", "always", "if_two"]
"""Whether the halves of a layer's outputs are the other way round in diffusers (shift and scale of a final norm);
`if_two`: only where the layer has two outputs a hidden unit, which tells SD3's last text norm from the others."""


@dataclass(frozen=True)
class Part:
    """A diffusers layer within an original one: its path, `{}` for each number, and its share of the rows."""

    path: str
    share: int = 1


@dataclass(frozen=True)
class Entry:
    """An original layer's name, `{}` for each number, and the diffusers layers it holds, in the order of its rows."""

    name: str
    parts: tuple[Part, ...]
    swap: Swap = "never"


@dataclass(frozen=True)
class Target:
    """An entry with its numbers filled in."""

    family: str
    component: Component
    name: str
    parts: tuple[Part, ...]
    swap: Swap = "never"

    @property
    def renamed(self) -> bool:
        """Whether the name tells it from diffusers'."""
        return self.name != self.parts[0].path


def plain(name: str, path: str, swap: Swap = "never") -> Entry:
    """An original layer that is one diffusers layer."""
    return Entry(name, (Part(path),), swap)


@dataclass(frozen=True)
class _Spelling:
    pattern: re.Pattern[str]
    entry: Entry
    part: int | None


class KeyTable:
    """One model family's entries, found by either name, with dots or (as kohya's tools write them) underscores.

    Args:
        family: the family's name.
        component: the pipeline component that the layers belong to.
        entries: where several hold one diffusers layer, the first is the one to write.
        kohya_module: the module of kohya's tools that makes its adapters, which their files name.
        kohya_by_path: whether kohya's tools name the layers as diffusers does instead.
        one_encoder: whether its models have one text encoder, which kohya's tools give no number then.
    """

    def __init__(
        self,
        family: str,
        component: Component,
        entries: Sequence[Entry],
        *,
        kohya_module: str,
        kohya_by_path: bool = False,
        one_encoder: bool = False,
    ) -> None:
        self.family = family
        self.component: Component = component
        self.kohya_module = kohya_module
        self.kohya_by_path = kohya_by_path
        self.one_encoder = one_encoder
        self.entries = tuple(entries)
        self._found: dict[tuple[bool, str], list[_Spelling]] = {}
        for entry in self.entries:
            self._add(entry.name, entry, None)
            for index, part in enumerate(entry.parts):
                self._add(part.path, entry, index)

    def _add(self, template: str, entry: Entry, part: int | None) -> None:
        for underscored in (False, True):
            text = template.replace(".", "_") if underscored else template
            pattern = re.compile(re.escape(text).replace(r"\{\}", "(0|[1-9][0-9]{0,3})"))
            key = (underscored, _without_numbers(text.replace("{}", "0")))
            self._found.setdefault(key, []).append(_Spelling(pattern, entry, part))

    def by_name(self, name: str, *, underscored: bool = False) -> Target | None:
        """The original layer of that name."""
        for spelling, numbers in self._matches(name, underscored):
            if spelling.part is None:
                return self._filled(spelling.entry, numbers)
        return None

    def by_path(self, path: str, *, underscored: bool = False) -> tuple[Target, int] | None:
        """The original layer that holds a diffusers layer, and the place of that one among its parts."""
        for spelling, numbers in self._matches(path, underscored):
            if spelling.part is not None:
                return self._filled(spelling.entry, numbers), spelling.part
        return None

    def _matches(self, text: str, underscored: bool) -> list[tuple[_Spelling, tuple[str, ...]]]:
        spellings = self._found.get((underscored, _without_numbers(text)), [])
        return [(each, found.groups()) for each in spellings if (found := each.pattern.fullmatch(text))]

    def _filled(self, entry: Entry, numbers: tuple[str, ...]) -> Target:
        parts = tuple(Part(part.path.format(*numbers), part.share) for part in entry.parts)
        return Target(self.family, self.component, entry.name.format(*numbers), parts, entry.swap)


def _without_numbers(text: str) -> str:
    return re.sub("[0-9]+", "#", text)
