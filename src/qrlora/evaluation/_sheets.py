"""Drawing pictures themselves, each with its scores under it."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from qrlora.data import square
from qrlora.evaluation._layout import WeightGrid
from qrlora.evaluation._report import Drift, Report
from qrlora.evaluation._samples import DriftPair, Sample
from qrlora.pages import FAINT, INK, WIDTH

COLUMNS = 5
MOST_PICTURES = 40
_SIDE = 192  # of a picture on the sheet, in pixels: its width at 200 dots an inch
_LETTERS = 20


@dataclass(frozen=True)
class _Cell:
    image: Image.Image
    title: str
    text: str


def references_figure(samples: Sequence[tuple[str, Sample]]) -> Figure:
    """The pictures compared with, each under its role."""
    cells = [_Cell(sample.image, f"{role}: {sample.name}", "") for role, sample in samples]
    return _sheet(_rows(cells, COLUMNS))


def pictures_figure(samples: Sequence[Sample], report: Report, shown: Sequence[str]) -> Figure:
    """The first pictures in their order, each with its scores; a group begins a row where that leaves few gaps."""
    named = list(zip(samples[:MOST_PICTURES], report.pictures, strict=False))
    groups = [list(members) for _, members in groupby(named, key=lambda pair: pair[1].group)]
    if 2 * len(groups) > len(named):
        cells = [_Cell(sample.image, row.name, _scores(row.scores, shown)) for sample, row in named]
        return _sheet(_rows(cells, COLUMNS))
    rows: list[list[_Cell]] = []
    for members in groups:
        titles = [members[0][1].group, *[""] * (len(members) - 1)]
        cells = [
            _Cell(sample.image, title, _scores(row.scores, shown))
            for title, (sample, row) in zip(titles, members, strict=True)
        ]
        rows += _rows(cells, COLUMNS)
    return _sheet(rows)


def _rows(cells: Sequence[_Cell], columns: int) -> list[list[_Cell]]:
    return [list(cells[start : start + columns]) for start in range(0, len(cells), columns)]


def grid_figure(samples: Sequence[Sample], report: Report, grid: WeightGrid, shown: Sequence[str]) -> Figure:
    """The pictures of a grid in its order, the first of each pair of weights."""
    first = {row.group: (sample, row) for sample, row in reversed(list(zip(samples, report.pictures, strict=True)))}
    down, across = len(grid.rows), len(grid.columns)
    wide = WIDTH / (across + 0.3)
    lines = len(shown)
    figure = Figure(figsize=(WIDTH, 0.35 + down * (wide + 0.04 + 0.12 * lines)), layout="constrained")
    for row in range(down):
        for column in range(across):
            ax = figure.add_subplot(down, across, row * across + column + 1)
            _bare(ax)
            group = grid.groups[row][column]
            if group is not None:
                sample, scores = first[group.name]
                ax.imshow(_small(sample.image))
                ax.set_xlabel(_scores(scores.scores, shown), fontsize=6.5, color=INK, labelpad=2)
            if row == 0:
                title = f"{grid.names[1]} {grid.columns[column]:g}" if column == 0 else f"{grid.columns[column]:g}"
                ax.set_title(title, fontsize=7.5, color=INK)
            if column == 0:
                title = f"{grid.names[0]} {grid.rows[row]:g}" if row == 0 else f"{grid.rows[row]:g}"
                ax.set_ylabel(title, fontsize=7.5, color=INK)
    return figure


def drift_figure(pairs: Sequence[DriftPair], drifts: Sequence[Drift]) -> Figure:
    """Each prompt's picture by the base over the one with adapters, how far it moved under them."""
    blocks = -(-len(pairs) // COLUMNS)
    lines = 3 + len(drifts)
    figure = Figure(figsize=(WIDTH, blocks * (2 * WIDTH / COLUMNS + 0.11 * lines)), layout="constrained")
    for index, pair in enumerate(pairs):
        block, column = divmod(index, COLUMNS)
        for half, image in enumerate((pair.base, pair.adapted)):
            ax = figure.add_subplot(2 * blocks, COLUMNS, (2 * block + half) * COLUMNS + column + 1)
            _bare(ax)
            ax.imshow(_small(image))
            if column == 0:
                ax.set_ylabel(("base", "with adapters")[half], fontsize=7, color=INK)
            if half == 0:
                ax.set_title("\n".join(_wrapped(pair.prompt)), fontsize=6, color=INK)
            else:
                moved = "\n".join(f"{drift.metric} {drift.values[index]:.2f}" for drift in drifts)
                ax.set_xlabel(moved, fontsize=6.5, color=INK, labelpad=2)
    return figure


def _scores(scores: dict[str, float], shown: Sequence[str]) -> str:
    roles = {name: name.split(".")[0].split("_")[0] for name in shown}
    return "\n".join(f"{roles[name]} {scores[name]:.2f}" for name in shown if name in scores).replace("-", "−")


def _sheet(rows: Sequence[Sequence[_Cell]]) -> Figure:
    """Rows of pictures; a title is over the first of its group and may be as wide as the row."""
    columns = max(3, *map(len, rows)) if len(rows) > 1 else max(3, len(rows[0]))
    heights = [_heights(row) for row in rows]
    figure = Figure(figsize=(WIDTH, sum(WIDTH / columns + 0.125 * lines for lines in heights)), layout="constrained")
    grid = figure.add_gridspec(len(rows), columns, height_ratios=[WIDTH / columns + 0.125 * n for n in heights])
    for down, row in enumerate(rows):
        single = sum(bool(cell.title) for cell in row) == 1
        for across, cell in enumerate(row):
            ax = figure.add_subplot(grid[down, across])
            _bare(ax)
            ax.imshow(_small(cell.image))
            if single and cell.title:
                title = ax.set_title(cell.title, fontsize=7, color=INK, pad=3, loc="left", fontweight="bold")
                title.set_in_layout(False)  # else its picture would be as wide as its words
            else:
                ax.set_title("\n".join(_wrapped(cell.title)), fontsize=6.5, color=INK, pad=3)
            ax.set_xlabel(cell.text, fontsize=6.5, color=INK, labelpad=2)
    return figure


def _heights(row: Sequence[_Cell]) -> float:
    """Lines of words above and below a row of pictures."""
    below = max(1 + cell.text.count("\n") if cell.text else 0 for cell in row)
    single = sum(bool(cell.title) for cell in row) == 1
    above = 1 if single else max(len(_wrapped(cell.title)) for cell in row)
    return below + above + (1 if below else 0.4)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _LETTERS, max_lines=2, placeholder="…") or [""]


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color(FAINT)
    ax.spines[:].set_linewidth(0.4)


def _small(image: Image.Image) -> np.ndarray:
    return np.asarray(square(image, min(_SIDE, *image.size) if min(image.size) > _SIDE else min(image.size)))
