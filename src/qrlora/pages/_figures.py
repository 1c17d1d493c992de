"""What the figures of all reports have in common."""

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 5.2  # inches: read on a phone at its full width, the letters are still about 2 mm high
FIRST, SECOND, BAND, INK, FAINT = "#1f5f8b", "#c2542d", "#dcdbd4", "#333333", "#8a8a85"


@dataclass(frozen=True)
class Picture:
    """A figure of the report as a file.

    Attributes:
        file: name in the report's folder.
        title, caption: what it shows, and how to read it.
        content: PNG.
    """

    file: str
    title: str
    caption: str
    content: bytes

    @classmethod
    def of(cls, file: str, title: str, caption: str, figure: Figure) -> "Picture":
        return cls(file, title, caption, png(figure))


def png(figure: Figure) -> bytes:
    """The figure as a PNG, 200 dots an inch; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def plain_axes(ax: Axes) -> None:
    """Two faint spines, small ticks, a grid behind."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(labelsize=7.5, colors=INK, length=2.5)
    ax.grid(axis="y", color="#eeeeea", linewidth=0.7)
    ax.set_axisbelow(True)
