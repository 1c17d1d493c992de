"""Read the emoji data set that `tools.emoji.build` wrote."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Emoji:
    """All pictures with their style and content; contents are named by key, styles by name."""

    arrays: np.ndarray
    style: np.ndarray
    content: np.ndarray
    meta: dict[str, Any]
    rows: dict[tuple[str, str], int] = field(repr=False)

    @classmethod
    def load(cls, path: Path | str = Path("data/emoji.npz")) -> "Emoji":
        """Read the file, without unpickling anything."""
        with np.load(path, allow_pickle=False) as file:
            arrays, style, content = file["pictures"], file["style"], file["content"]
            meta = json.loads(file["meta"].tobytes())
        return cls.of(arrays, style, content, meta)

    @classmethod
    def of(cls, arrays: np.ndarray, style: np.ndarray, content: np.ndarray, meta: dict[str, Any]) -> "Emoji":
        """Put the parts together and index them."""
        if not len(arrays) == len(style) == len(content):
            raise ValueError(f"{len(arrays)} pictures, {len(style)} styles, {len(content)} contents: lengths differ")
        keys = [entry["key"] for entry in meta["contents"]]
        names = [entry["name"] for entry in meta["styles"]]
        pairs = zip(content.tolist(), style.tolist(), strict=True)
        return cls(arrays, style, content, meta, {(keys[c], names[s]): row for row, (c, s) in enumerate(pairs)})

    def __len__(self) -> int:
        return len(self.arrays)

    def __contains__(self, pair: object) -> bool:
        """Whether the pair (content key, style) was drawn."""
        return pair in self.rows

    def __getitem__(self, pair: tuple[str, str]) -> np.ndarray:
        """The uint8 picture [H, W, 3] of (content key, style)."""
        return self.arrays[self.rows[pair]]

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        return int(self.meta["size"])

    @property
    def styles(self) -> tuple[str, ...]:
        """All style names, in the order of their indices."""
        return tuple(entry["name"] for entry in self.meta["styles"])

    @property
    def contents(self) -> tuple[str, ...]:
        """All content keys, in the order of their indices."""
        return tuple(entry["key"] for entry in self.meta["contents"])

    @property
    def train_styles(self) -> tuple[str, ...]:
        """Styles the base model may see."""
        return self._styles("train")

    @property
    def held_out_styles(self) -> tuple[str, ...]:
        """Styles the base model never sees."""
        return self._styles("held-out")

    @property
    def train_contents(self) -> tuple[str, ...]:
        """Contents the base model may see."""
        return self._contents("train")

    @property
    def dev_contents(self) -> tuple[str, ...]:
        """Held-out contents to tune on."""
        return self._contents("dev")

    @property
    def test_contents(self) -> tuple[str, ...]:
        """Held-out contents to report on."""
        return self._contents("test")

    def _styles(self, role: str) -> tuple[str, ...]:
        return tuple(entry["name"] for entry in self.meta["styles"] if entry["role"] == role)

    def _contents(self, split: str) -> tuple[str, ...]:
        return tuple(entry["key"] for entry in self.meta["contents"] if entry["split"] == split)

    def name(self, content: str) -> str:
        """English name of a content key."""
        return self._entry(content)["name"]

    def category(self, content: str) -> str:
        """Category of a content key, for instance `animals-nature`."""
        return self._entry(content)["category"]

    def _entry(self, content: str) -> dict[str, str]:
        for entry in self.meta["contents"]:
            if entry["key"] == content:
                return entry
        raise KeyError(content)

    def styles_of(self, content: str) -> tuple[str, ...]:
        """Styles that draw a content."""
        return tuple(style for style in self.styles if (content, style) in self.rows)

    def pairs(
        self, contents: Iterable[str] | None = None, styles: Sequence[str] | None = None
    ) -> list[tuple[str, str]]:
        """Drawn pairs (content key, style), contents first; all of them unless narrowed."""
        wanted = self.contents if contents is None else contents
        among = self.styles if styles is None else styles
        return [(content, style) for content in wanted for style in among if (content, style) in self.rows]

    def pictures(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """The uint8 pictures [N, H, W, 3] of the pairs, in their order."""
        return self.arrays[[self.rows[pair] for pair in pairs]]
