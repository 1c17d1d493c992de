"""Which contents, styles and prompts the benchmark uses: written once from the data set, and committed."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from benchmarks.fusion.config import HERE, Entry, checked, read_json
from qrlora.errors import QrloraError
from tools.emoji.dataset import Emoji
from tools.starter.pictures import training_contents

PATH = HERE / "splits.json"
COUNTS = {"dev": 12, "test": 60}
TAUGHT, SHOWN, UNRELATED = 8, 4, 12
FIRST = "1f34e"  # the red apple: where one picture shows a style, it is this one
# From unlike hands first, since a screen takes the front: shading, outlines, one colour; then the near relatives.
STYLES = ("fluent-3d", "openmoji", "emojione-mono", "fxemoji", "openmoji-black")


class Splits(Entry):
    """Keys of contents and names of styles.

    Attributes:
        content_style: the training style of content pictures.
        taught: known contents of the style pictures; adapters of one picture take the first, by seed the next.
        shown: known contents that a style adapter alone is asked for.
        unrelated: (content, style) the base knows, for drift.
        styles: held out, asked for.
        dev, test: held-out contents.
    """

    content_style: str
    taught: tuple[str, ...] = Field(min_length=TAUGHT, max_length=TAUGHT)
    shown: tuple[str, ...] = Field(min_length=SHOWN)
    unrelated: tuple[tuple[str, str], ...] = Field(min_length=1)
    styles: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]

    def contents(self, split: Literal["dev", "test"]) -> tuple[str, ...]:
        """Of one split."""
        return self.dev if split == "dev" else self.test

    def style_pictures(self, shots: int, seed: int) -> tuple[str, ...]:
        """The known contents whose pictures teach a style.

        Raises:
            QrloraError: more than there are.
        """
        if shots > len(self.taught):
            raise QrloraError(f"{shots} style pictures are asked for, and there are {len(self.taught)}.")
        return tuple(self.taught[(seed + i) % len(self.taught)] for i in range(shots))

    def check(self, emoji: Emoji) -> None:
        """Refuse a data set that lacks a picture of these splits.

        Raises:
            QrloraError: names the first.
        """
        needed = [(c, s) for c in (*self.dev, *self.test) for s in (self.content_style, *self.styles)]
        needed += [(c, s) for c in (*self.taught, *self.shown) for s in self.styles]
        needed += list(self.unrelated)
        for pair in needed:
            if pair not in emoji:
                raise QrloraError(f"the data set has no picture of {pair[0]} in {pair[1]}, which splits.json names.")


def derive(emoji: Emoji) -> Splits:
    """The splits of a data set; a function of it alone."""
    styles = tuple(style for style in STYLES if style in emoji.held_out_styles)
    content_style = emoji.train_styles[0]

    def drawn(contents: tuple[str, ...] | list[str]) -> list[str]:
        wanted = (content_style, *styles)
        return [c for c in contents if emoji.category(c) != "symbols" and all((c, s) in emoji for s in wanted)]

    known = drawn(training_contents(emoji))
    first = [content for content in known if content == FIRST]
    chosen = first + spread([c for c in known if c != FIRST], TAUGHT + SHOWN - len(first))
    unrelated = spread([c for c in known if c not in chosen], UNRELATED)
    held = {"dev": drawn(emoji.dev_contents), "test": drawn(emoji.test_contents)}
    return Splits(
        content_style=content_style,
        taught=tuple(chosen[i] for i in range(TAUGHT + SHOWN) if i % 3 != 2),
        shown=tuple(chosen[i] for i in range(TAUGHT + SHOWN) if i % 3 == 2),
        unrelated=tuple((c, emoji.train_styles[i % len(emoji.train_styles)]) for i, c in enumerate(unrelated)),
        styles=styles,
        dev=tuple(spread(held["dev"], COUNTS["dev"])),
        test=tuple(spread(held["test"], COUNTS["test"])),
    )


def spread(items: list[str], count: int) -> list[str]:
    """`count` of the items, evenly spaced, in an order whose every beginning is spread out too.

    Raises:
        QrloraError: there are fewer.
    """
    if len(items) < count:
        raise QrloraError(f"{count} contents are needed and {len(items)} are drawn in all styles.")
    even = [items[i * len(items) // count] for i in range(count)]
    order = sorted(range(count), key=lambda i: (_reversed_bits(i), i))
    return [even[i] for i in order]


def _reversed_bits(number: int, width: int = 16) -> int:
    return int(format(number, f"0{width}b")[::-1], 2)


def load(path: Path = PATH) -> Splits:
    """Raises QrloraError: no such file, or not valid."""
    return checked(Splits, read_json(path), str(path))
