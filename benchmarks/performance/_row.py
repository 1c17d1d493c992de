"""What a row of the table is, and what measuring it finds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


class NotHere(Exception):
    """A row cannot be measured on this machine; says what is missing. Its earlier result stays."""


@dataclass(frozen=True)
class Goal:
    """One number that the target speaks of."""

    what: str
    value: float
    target: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the number is where it should be."""
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        measured: ours, as the table says it.
        peers: the peers of the same run, as the table says them.
        goals: the numbers to judge by; none for a row that only shows how something grows.
        limit: what operations and bytes allow, worked out.
        details: everything that was measured.
    """

    measured: str
    peers: str
    goals: tuple[Goal, ...] = ()
    limit: str = ""
    details: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Row:
    """One row: what is measured against what, the target, and how.

    Attributes:
        name: what the command line calls it, and its file.
        what: is measured.
        against: what.
        target: as the table says it.
        measure: quick or not to what was found; quick is tiny, for trying out, and says nothing.
        device: "cuda" where the row needs a GPU.
    """

    name: str
    what: str
    against: str
    target: str
    measure: Callable[[bool], Found]
    device: Literal["cpu", "cuda"] = "cpu"


def spread(values: list[float], digits: int = 2) -> str:
    """`1.04-1.12`, or one number where they are equal."""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"
