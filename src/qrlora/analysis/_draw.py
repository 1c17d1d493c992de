"""Drawing: layers along an axis, bars beside chance, heat maps. Explicit matplotlib figures, no global state."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from qrlora.analysis._names import Grid, place_of
from qrlora.pages import BAND, FAINT, FIRST, INK, SECOND, WIDTH, plain_axes

_TICKS = 9
_NAMED_CELLS = 24


@dataclass(frozen=True)
class Line:
    """Values along the layers (None where there is none), and the mean and deviation of chance under them."""

    label: str
    values: Sequence[float | None]
    color: str
    chance: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Sequence[Line]
    label: str
    log: bool = False
    limits: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Bar:
    """One row of a bar figure: a value, and chance."""

    label: str
    value: float
    text: str
    chance: tuple[float, float] | None


def lines_figure(layers: Sequence[str], panels: Sequence[Panel]) -> Figure:
    """Panels one below the other over the same layers."""
    figure = Figure(figsize=(WIDTH, 0.7 + 1.45 * len(panels)), layout="constrained")
    axes = [figure.add_subplot(len(panels), 1, row + 1) for row in range(len(panels))]
    told: set[str] = set()
    for panel, ax in zip(panels, axes, strict=True):
        plain_axes(ax)
        ax.set_title(panel.title, fontsize=9, color=INK, loc="left", fontweight="bold")
        ax.set_ylabel(panel.label, fontsize=8, color=INK)
        for line in panel.lines:
            _draw_line(ax, line, tinted=len(panel.lines) > 1)
        if panel.log:
            _logarithmic(ax)
        ax.set_ylim(*panel.limits)
        _layer_axis(ax, layers, labels=ax is axes[-1])
        labels = set(ax.get_legend_handles_labels()[1])
        if len(labels) > 1 and not labels <= told:
            told |= labels
            ax.legend(fontsize=7, frameon=False, loc="best", ncols=3, handlelength=1.4, labelcolor=INK)
    return figure


def _draw_line(ax: Axes, line: Line, *, tinted: bool) -> None:
    if any(line.chance):
        mean, std = np.array([each or (np.nan, np.nan) for each in line.chance]).T
        across = np.arange(len(mean))
        ax.fill_between(
            across,
            mean - 2 * std,
            mean + 2 * std,
            step="mid",
            linewidth=0,
            label=f"{line.label}, random" if tinted else "random",
            color=line.color if tinted else BAND,
            alpha=0.18 if tinted else 1.0,
        )
    values = np.array([np.nan if value is None else value for value in line.values])
    size = 2.2 if len(values) <= 80 else 1.2
    ax.plot(values, color=line.color, linewidth=0.8, marker="o", markersize=size, label=line.label, zorder=3)


def bars_figure(bars: Sequence[Bar]) -> Figure:
    """Values between -1 and 1 as bars, chance as a grey mark as wide as plus and minus two deviations."""
    figure = Figure(figsize=(WIDTH, 0.8 + 0.27 * len(bars)), layout="constrained")
    ax = figure.add_subplot()
    plain_axes(ax)
    rows = list(range(len(bars)))
    for row, bar in zip(rows, bars, strict=True):
        ax.barh(row, bar.value, height=0.5, color=FIRST, zorder=2, label="these adapters" if not row else None)
        if bar.chance is not None:
            mean, std = bar.chance
            wide = max(4 * std, 0.012)
            ax.barh(
                row,
                wide,
                left=mean - wide / 2,
                height=0.86,
                color=FAINT,
                alpha=0.75,
                zorder=3,
                label=None if row else "random matrices",
            )
        ax.text(1.02, row, bar.text, fontsize=7.5, color=INK, va="center", transform=ax.get_yaxis_transform())
    ax.set_yticks(rows, [bar.label for bar in bars], fontsize=8, color=INK)
    ax.set_xlim(min(0.0, *(bar.value for bar in bars)) * 1.1, 1.0)
    ax.invert_yaxis()
    ax.axvline(0, color=FAINT, linewidth=0.8)
    figure.legend(fontsize=7.5, frameon=False, loc="outside upper left", ncols=2, handlelength=1.2, labelcolor=INK)
    return figure


def grouped_bars_figure(names: Sequence[str], groups: Sequence[Sequence[float]], label: str) -> Figure:
    """For each expert a bar of each name, side by side; the line is an equal share."""
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    ax = figure.add_subplot()
    plain_axes(ax)
    experts = max(map(len, groups))
    wide = 0.8 / len(groups)
    for index, (name, values) in enumerate(zip(names, groups, strict=True)):
        left = np.arange(len(values)) - 0.4 + wide * (index + 0.5)
        ax.bar(left, values, width=wide * 0.92, label=name, color=(FIRST, SECOND, FAINT, BAND)[index % 4], zorder=2)
    ax.axhline(1 / experts, color=INK, linewidth=0.8, linestyle=":", label="equal shares", zorder=3)
    ax.set_xticks(range(experts), [f"expert {expert + 1}" for expert in range(experts)])
    ax.set_ylabel(label, fontsize=8, color=INK)
    ax.set_ylim(0, 1.25 * max(max(values) for values in groups))
    ax.legend(fontsize=7.5, frameon=False, ncols=3, labelcolor=INK)
    return figure


def spectra_figure(spectra: Sequence[Sequence[float]]) -> Figure:
    """One faint line a layer, its singular values over the largest, and the median of the layers in front."""
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    ax = figure.add_subplot()
    plain_axes(ax)
    longest = max(map(len, spectra))
    padded = np.array([[*values, *[np.nan] * (longest - len(values))] for values in spectra])
    places = np.arange(1, longest + 1)
    ax.plot(places, padded.T, color=FIRST, alpha=max(0.04, min(0.3, 8 / len(spectra))), linewidth=0.8)
    ax.plot(
        places, np.nanmedian(padded, axis=0), color=SECOND, linewidth=1.8, marker="o", markersize=2.5, label="median"
    )
    ax.set_ylim(0, 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("singular value", fontsize=8, color=INK)
    ax.set_ylabel("share of the largest", fontsize=8, color=INK)
    ax.legend(fontsize=7.5, frameon=False, labelcolor=INK)
    return figure


def heat_figure(
    grid: Grid, label: str, *, signed: bool, numbers: bool | None = None, top: float | None = None
) -> Figure:
    """Modules by blocks; `signed` colours around 0, otherwise from 0 up. Cells that do not exist stay hatched.

    Columns of one block stand apart from the next. The colours end at `top`, the largest cell where None.
    """
    cells = np.array([[np.nan if cell is None else cell for cell in row] for row in grid.cells])
    if top is None:
        top = float(np.nanmax(np.abs(cells))) or 1.0
    figure = Figure(figsize=(WIDTH, 1.3 + 0.24 * len(grid.modules)), layout="constrained")
    ax = figure.add_subplot()
    ax.set_facecolor("#f4f4f1")
    if signed:
        image = ax.imshow(cells, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(0, -top, top))
    else:
        image = ax.imshow(cells, aspect="auto", cmap="YlGnBu", vmin=0, vmax=top)
    ax.set_yticks(range(len(grid.modules)), grid.modules, fontsize=7.5, color=INK)
    _block_axis(ax, grid.blocks)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if numbers if numbers is not None else len(grid.blocks) <= _NAMED_CELLS // 3:
        _write_cells(ax, cells, top, signed)
    bar = figure.colorbar(image, ax=ax, shrink=0.9, aspect=18, pad=0.02)
    bar.ax.tick_params(labelsize=7, colors=INK, length=2)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    bar.set_label(label, fontsize=8, color=INK)
    return figure


def _write_cells(
    ax: Axes, cells: "np.ndarray[tuple[int, int], np.dtype[np.float64]]", top: float, signed: bool
) -> None:
    for row, column in zip(*np.nonzero(~np.isnan(cells)), strict=True):
        value = float(cells[row, column])
        dark = abs(value) > (0.6 if signed else 0.55) * top
        text = f"{value:.2g}".replace("-", "−")
        ax.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white" if dark else INK)


def _logarithmic(ax: Axes) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _layer_axis(ax: Axes, layers: Sequence[str], *, labels: bool) -> None:
    """Ticks where blocks begin, at most nine; plain counts where the names show no blocks."""
    ax.set_xlim(-0.6, len(layers) - 0.4)
    places = [place_of(layer) for layer in layers]
    starts = [
        (index, place.block)
        for index, place in enumerate(places)
        if place is not None and (not index or (before := places[index - 1]) is None or before.block != place.block)
    ]
    if len(starts) > 1:
        shown = starts[:: -(-len(starts) // _TICKS)]
        ax.set_xticks([index for index, _ in shown], [block for _, block in shown] if labels else [])
        for index, _ in starts[1:]:
            ax.axvline(index - 0.5, color="#eeeeea", linewidth=0.7, zorder=0)
        for tick in ax.get_xticklabels():
            tick.set(rotation=35, ha="right", rotation_mode="anchor")
    elif labels:
        ax.set_xlabel("layer", fontsize=8, color=INK)


def _block_axis(ax: Axes, blocks: Sequence[str]) -> None:
    """At most 18 labels, each block's at its first column."""
    starts = [index for index, block in enumerate(blocks) if not index or blocks[index - 1] != block]
    if len(starts) < len(blocks):
        for index in starts[1:]:
            ax.axvline(index - 0.5, color=FAINT, linewidth=1)
    shown = starts[:: -(-len(starts) // (2 * _TICKS))]
    ax.set_xticks(shown, [blocks[index] for index in shown], fontsize=7.5, color=INK)
    for tick in ax.get_xticklabels():
        tick.set(rotation=35, ha="right", rotation_mode="anchor")
