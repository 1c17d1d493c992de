"""Drawing scores: where pictures lie between content and style, means with intervals, grids of weights."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qrlora.evaluation._layout import WeightGrid
from qrlora.evaluation._report import Measure, Report
from qrlora.pages import FAINT, INK, WIDTH, plain_axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which the colour-blind tell apart."""
MARKERS = "osD^vPX"
_LABELLED = 14
_THINGS = 12


def map_figure(report: Report, across: str, up: str, grid: WeightGrid | None) -> Figure:
    """Content across, style up: a line a row of the grid, or a point a picture and a large one a group."""
    figure = Figure(figsize=(WIDTH, 4.1), layout="constrained")
    ax = figure.add_subplot()
    plain_axes(ax)
    ax.grid(axis="x", color="#eeeeea", linewidth=0.7)
    if grid is not None:
        _draw_rows(ax, grid, across, up)
    else:
        _draw_groups(ax, report, across, up)
    corners = (
        (1.0, report.measures[up].other, "content picture", "right"),
        (report.measures[across].other, 1.0, "style picture", "left"),
    )
    for x, y, text, side in corners:
        if x is not None and y is not None:
            ax.plot(x, y, marker="*", markersize=11, color=INK, linestyle="none", zorder=5)
            shift = -8 if side == "right" else 8
            ax.annotate(
                text, (x, y), (shift, -2), textcoords="offset points", fontsize=7.5, color=INK, ha=side, va="top"
            )
    ax.set_xlabel(f"{_axis(report.measures[across])} →", fontsize=8, color=INK)
    ax.set_ylabel(f"{_axis(report.measures[up])} →", fontsize=8, color=INK)
    ax.margins(0.08)
    if ax.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", fontsize=7, frameon=False, ncols=4, labelcolor=INK)
    return figure


def _axis(measure: Measure) -> str:
    return f"like the {measure.title}"


def _draw_rows(ax: Axes, grid: WeightGrid, across: str, up: str) -> None:
    shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(grid.rows)))
    sizes = np.linspace(14, 70, len(grid.columns))
    for weight, shade, xs, ys in zip(grid.rows, shades, grid.values(across), grid.values(up), strict=True):
        known = [(x, y, size) for x, y, size in zip(xs, ys, sizes, strict=True) if x is not None and y is not None]
        if not known:
            continue
        x, y, size = zip(*known, strict=True)
        ax.plot(x, y, color=shade, linewidth=1.2, zorder=2)
        ax.scatter(x, y, s=size, color=shade, edgecolor="white", linewidth=0.6, zorder=3)
        ax.plot([], [], color=shade, marker="o", linewidth=1.2, label=f"{grid.names[0]} {weight:g}")


def _draw_groups(ax: Axes, report: Report, across: str, up: str) -> None:
    for place, group in enumerate(report.groups):
        rows = [row.scores for row in report.pictures if row.group == group.name]
        points = [(scores[across], scores[up]) for scores in rows if across in scores and up in scores]
        if not points:
            continue
        color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
        x, y = zip(*points, strict=True)
        label = group.name if place < _LABELLED else None
        if len(points) > 1:
            ax.scatter(x, y, s=13, color=color, marker=marker, alpha=0.45, linewidth=0, zorder=2)
        mean = (group.means[across].mean, group.means[up].mean)
        ax.scatter(*mean, s=62, color=color, marker=marker, edgecolor="white", linewidth=0.8, zorder=4, label=label)


def means_figure(report: Report, names: Sequence[str]) -> Figure:
    """A panel a measure: a row a group, its pictures faint, the mean and its interval in front."""
    rows = len(report.groups)
    each = 0.55 + 0.2 * rows
    figure = Figure(figsize=(WIDTH, 0.2 + each * len(names)), layout="constrained")
    for place, name in enumerate(names):
        measure = report.measures[name]
        ax = figure.add_subplot(len(names), 1, place + 1)
        plain_axes(ax)
        ax.grid(axis="x", color="#eeeeea", linewidth=0.7)
        better = "higher is better" if measure.better == "higher" else "lower is better"
        ax.set_title(f"{measure.title}, {better}", fontsize=8.5, color=INK, loc="left", fontweight="bold")
        for row in range(rows):
            _draw_mean(ax, report, name, row, COLORS[row % len(COLORS)], MARKERS[row % len(MARKERS)])
        if measure.other is not None:
            role = "style" if name.startswith("content") else "content"
            ax.axvline(measure.other, color=FAINT, linestyle="--", linewidth=1, label=f"the {role} picture itself")
            ax.legend(fontsize=6.5, frameon=False, loc="best", labelcolor=INK)
        ax.set_yticks(range(rows), [_shortened(group.name, 34) for group in report.groups], fontsize=7.5, color=INK)
        ax.set_ylim(rows - 0.4, -0.6)
        ax.margins(x=0.06)
    return figure


def _draw_mean(ax: Axes, report: Report, name: str, row: int, color: str, marker: str) -> None:
    group = report.groups[row]
    found = group.means.get(name)
    if found is None:
        return
    values = [each.scores[name] for each in report.pictures if each.group == group.name and name in each.scores]
    if len(values) > 1:
        ax.plot(values, [row] * len(values), linestyle="none", marker="|", markersize=7, color=color, alpha=0.4)
    if found.low is not None and found.high is not None:
        ax.plot([found.low, found.high], [row, row], color=color, linewidth=1.8, solid_capstyle="butt", zorder=3)
    ax.plot(found.mean, row, marker=marker, color=color, markersize=6, markeredgecolor="white", zorder=4)


def weights_figure(report: Report, grid: WeightGrid, names: Sequence[str]) -> Figure:
    """A heat map a measure over the weights of two adapters, two side by side."""
    down = -(-len(names) // 2)
    figure = Figure(figsize=(WIDTH, down * (0.75 + 0.36 * len(grid.rows))), layout="constrained")
    for place, name in enumerate(names):
        ax = figure.add_subplot(down, 2, place + 1)
        cells = np.array([[np.nan if cell is None else cell for cell in row] for row in grid.values(name)])
        low, high = float(np.nanmin(cells)), float(np.nanmax(cells))
        better = report.measures[name].better
        ax.imshow(cells, cmap="cividis" if better == "higher" else "cividis_r", aspect="auto", vmin=low, vmax=high)
        _write_cells(ax, cells, low, high, dark_is_low=better == "higher")
        ax.set_title(report.measures[name].title, fontsize=8, color=INK, loc="left", fontweight="bold")
        ax.set_xticks(range(len(grid.columns)), [f"{weight:g}" for weight in grid.columns], fontsize=7, color=INK)
        ax.set_yticks(range(len(grid.rows)), [f"{weight:g}" for weight in grid.rows], fontsize=7, color=INK)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_facecolor("#f4f4f1")
        ax.set_xlabel(f"weight of {_shortened(grid.names[1], 20)}", fontsize=7.5, color=INK)
        ax.set_ylabel(f"weight of {_shortened(grid.names[0], 20)}", fontsize=7.5, color=INK)
    return figure


def _write_cells(
    ax: Axes, cells: "np.ndarray[tuple[int, int], np.dtype[np.float64]]", low: float, high: float, *, dark_is_low: bool
) -> None:
    for row, column in zip(*np.nonzero(~np.isnan(cells)), strict=True):
        value = float(cells[row, column])
        share = (value - low) / (high - low) if high > low else 0.0
        dark = share < 0.5 if dark_is_low else share > 0.5
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else INK)


def gallery_figure(report: Report) -> Figure:
    """A panel a metric: how often pictures were taken for each thing, a colour a group; the right one is ticked."""
    metrics = list(dict.fromkeys(metric for row in report.pictures for metric in row.nearest))
    found = [_most_frequent([row.nearest[metric] for row in report.pictures]) for metric in metrics]
    heights = [0.55 + 0.2 * len(names) for names in found]
    figure = Figure(figsize=(WIDTH, 0.45 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(metrics), 1, squeeze=False, height_ratios=heights)[:, 0]
    told = 1 < len(report.groups) <= len(COLORS)
    groups = [[group.name] for group in report.groups] if told else [[group.name for group in report.groups]]
    for ax, metric, names in zip(axes, metrics, found, strict=True):
        plain_axes(ax)
        left = np.zeros(len(names))
        for place, members in enumerate(groups):
            said = [row.nearest[metric] for row in report.pictures if row.group in members]
            counts = np.array([said.count(name) for name in names])
            label = members[0] if told and ax is axes[0] else None
            color = COLORS[place] if told else FAINT
            ax.barh(range(len(names)), counts, left=left, height=0.6, color=color, edgecolor="white", label=label)
            left += counts
        labels = [f"{_shortened(name, 26)}{' ✓' if name == report.wanted else ''}" for name in names]
        ax.set_yticks(range(len(names)), labels, fontsize=7.5, color=INK)
        ax.invert_yaxis()
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_title(f"taken for, by {metric}", fontsize=8.5, color=INK, loc="left", fontweight="bold")
    axes[-1].set_xlabel("pictures", fontsize=8, color=INK)
    if told:
        figure.legend(loc="outside lower center", fontsize=7, frameon=False, ncols=4, labelcolor=INK)
    return figure


def _most_frequent(names: Sequence[str]) -> list[str]:
    """At most `_THINGS` different names, the most frequent first."""
    return [name for name, _ in Counter(names).most_common(_THINGS)]


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
