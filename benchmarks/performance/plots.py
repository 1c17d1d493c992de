"""The results as pictures: how near each target is, the adapted layer, and how time and memory grow."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.performance import _layers as layers
from benchmarks.performance import _steps as models
from benchmarks.performance.rows.growth import KEPT, RATIO
from benchmarks.performance.table import Result

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

# Okabe and Ito's colours, told apart with every kind of colour vision; markers say the same again.
STYLES: dict[str, dict[str, Any]] = {
    layers.OURS: {"color": "#0072B2", "marker": "o", "zorder": 5, "linewidth": 2.2},
    layers.PEFT: {"color": "#E69F00", "marker": "s"},
    layers.PEFT_HALF: {"color": "#F0E442", "marker": "D", "markeredgecolor": "#666666"},
    layers.SCRIPT: {"color": "#D55E00", "marker": "^"},
    layers.PUBLISHED: {"color": "#CC79A7", "marker": "v"},
    layers.PRODUCTS: {"color": "#999999", "marker": "x"},
    models.FROZEN: {"color": "#000000", "marker": "", "linestyle": ":"},
}
GROWTH = ("by-rank", "by-tokens", "by-layers", "by-adapters", "by-picture")


def draw_all(results: Mapping[str, Result], folder: Path) -> None:
    """What the results allow: `targets.png`, `layer.png`, `growth.png`."""
    if any(result["goals"] for result in results.values()):
        draw_targets(results, folder / "targets.png")
    if "layer" in results:
        draw_layer(results["layer"], folder / "layer.png")
    grown = {name: results[name] for name in GROWTH if name in results}
    if grown:
        draw_growth(grown, folder / "growth.png")


def draw_targets(results: Mapping[str, Result], path: Path) -> None:
    """Every goal as measured over target: left of the line is met."""
    found: list[tuple[str, float]] = []
    for name, result in results.items():
        for goal in result["goals"]:
            value, target = goal["value"], goal["target"]
            if target:  # a count that must be zero has no ratio
                over = value / target if goal["at_most"] else target / value
                found.append((f"{name}: {goal['what']}", over))
    figure, axes = plt.subplots(figsize=(9.5, 0.32 * len(found) + 1.2), constrained_layout=True)
    for place, (_, over) in enumerate(found):
        met = over <= 1
        colour = "#0072B2" if met else "#D55E00"
        axes.plot([1, over], [place, place], color=colour, linewidth=1.5)
        axes.plot(over, place, marker="o" if met else "X", color=colour, markersize=7)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set(xscale="log", xlabel="measured over target; left of the line is met (a cross: not met)")
    axes.set_yticks(range(len(found)), [label for label, _ in found], fontsize=8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    _plain_log(axes.xaxis, [over for _, over in found] + [1.0])
    axes.grid(axis="x", color="#e5e5e5")
    _save(figure, path)


def draw_layer(result: Result, path: Path) -> None:
    """Forward and backward over the frozen layer, one mark a way, one group a setting."""
    settings = result["details"]["settings"]
    ways = [way for way in layers.ALL if way != layers.FROZEN]
    figure, axes = plt.subplots(figsize=(8, 4.4), constrained_layout=True)
    for index, way in enumerate(ways):
        places = [place + 0.09 * (index - (len(ways) - 1) / 2) for place in range(len(settings))]
        style = {**STYLES[way], "linestyle": ""}
        axes.plot(places, [one["ratios"][way] for one in settings], label=way, markersize=8, **style)
    axes.axhline(1, color="#444444", linewidth=1)
    axes.axhline(1.05, color="#009E73", linewidth=1, linestyle="--", label="target")
    for place, one in enumerate(settings):
        label = "what the operations allow" if place == 0 else None
        axes.plot([place - 0.3, place + 0.3], [one["operations"]] * 2, color="#009E73", linewidth=3, label=label)
    names = [f"n={one['in']}\nT={one['tokens']}, r={one['rank']}" for one in settings]
    axes.set_xticks(range(len(settings)), names)
    axes.set_xlim(-0.4, len(settings) - 0.6)
    axes.set_ylabel(f"forward + backward over frozen, {settings[0]['dtype']}")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def draw_growth(results: Mapping[str, Result], path: Path) -> None:
    """Time above, memory below; one column a thing that grows."""
    figure, grid = plt.subplots(
        2, len(results), figsize=(3.4 * len(results), 6.4), constrained_layout=True, squeeze=False
    )
    for column, result in enumerate(results.values()):
        details = result["details"]
        points = details["points"]
        at = [point["at"] for point in points]
        for line, what in enumerate((RATIO, KEPT)):
            axes = grid[line][column]
            for way in points[0][what]:
                if way in (layers.FROZEN, models.FROZEN) and (what == RATIO or way == layers.FROZEN):
                    continue
                style = {"linestyle": "-", **STYLES[way]}
                axes.plot(at, [point[what][way] for point in points], label=way, markersize=5, **style)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(at))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.tick_params(labelsize=8)
            axes.grid(color="#eeeeee")
            if what == RATIO:
                axes.axhline(1, color="#444444", linewidth=1)
                axes.set_title(details["of"], fontsize=9)
            else:
                axes.set_ylim(0, None)
                axes.set_xlabel(details["axis"])
            if column == 0:
                axes.set_ylabel(what)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9
    )
    _save(figure, path)


def _plain_log(axis: Any, values: list[float]) -> None:
    """Ticks of a logarithmic axis as ordinary numbers."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    near, far = min(values) / 1.02, max(values) * 1.02
    for mantissas in ((1, 2, 5), (1, 1.2, 1.5, 2, 3, 5, 7), [n / 20 for n in range(20, 200)]):
        ticks = [m * 10**e for e in range(low - 1, high + 1) for m in mantissas]
        shown = [t for t in ticks if near <= t <= far]
        if len(shown) > 2:  # values close together need finer ones
            break
    axis.set_major_locator(FixedLocator(shown))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
