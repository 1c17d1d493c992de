"""Plots of a screen, and a sheet of pictures for each method. Colours are Okabe and Ito's, with markers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.fusion.report import hits, share
from benchmarks.fusion.statistics import bootstrap, geometric

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":", "-", "--", "-.")
SHOWN = 6
REFERENCES = {"true pictures": "*", "the base, without adapters": "x", "the content picture itself": "+"}
CELL, EDGE, HEAD = 96, 4, 22


def frontier(results: Mapping[str, Any], shots: str, path: Path) -> None:
    """Content right against style right as the weights move: the best methods in colour, the others as grey dots."""
    found = {name: each["shots"][shots] for name, each in results["methods"].items() if each.get("shots")}
    ranked = sorted(found, key=lambda name: -share(found[name]["best"]))
    front = list(dict.fromkeys([*ranked[: SHOWN - 1], *(name for name in ("lora",) if name in found)]))
    figure, axes = plt.subplots(figsize=(7.5, 5.6), layout="constrained")
    for name in ranked:
        points = outer([(p["content"], p["style"]) for p in found[name]["frontier"]])
        x, y = zip(*points, strict=True)
        if name in front:
            i = front.index(name)
            axes.plot(x, y, label=name, **_style(i))
        else:
            axes.plot(x, y, ".", color="0.75", markersize=6, zorder=0)
    for name, mark in REFERENCES.items():
        scores = results.get("references", {}).get(name)
        if scores:
            place = (float(np.mean(scores["content"])), float(np.mean(scores["style"])))
            axes.plot(*place, mark, color="0.3", markersize=12)
            side, shift = ("left", 8) if place[0] < 0.3 else ("right", -8)
            axes.annotate(name, place, xytext=(shift, 8), textcoords="offset points", fontsize=9, ha=side, color="0.3")
    axes.set(xlabel="share with the right content", ylabel="share with the right style", xlim=(-0.03, 1.05))
    axes.set_ylim(-0.03, 1.05)
    axes.set_title(f"As the weights move: {shots} style picture{'s' * (shots != '1')} (grey: other methods)")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _saved(figure, path)


def outer(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both, by the first coordinate."""
    best = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    return sorted(set(best))


def against_steps(results: Mapping[str, Any], shots: str, path: Path) -> bool:
    """The objective against the content adapter's steps; False where there are no other steps than the last."""
    last = results["stage"]["steps"]["content"]
    lines: dict[str, list[Point]] = {}
    for name, each in results["methods"].items():
        found = (each.get("shots") or {}).get(shots)
        if found and found.get("steps"):
            points = [Point(int(k), (s["content"] * s["style"]) ** 0.5) for k, s in found["steps"].items()]
            lines[name] = [*points, Point(last, share(found["even"]))]
    return _lines(lines, "steps of the content adapter", shots, path)


def against_rank(results: Mapping[str, Any], shots: str, ranks: Mapping[str, tuple[str, int]], path: Path) -> bool:
    """The objective at each method's best weights against rank, with its interval; False where no family has two ranks.

    Args:
        results: of a screen.
        shots: style pictures.
        ranks: by method, its family and rank.
        path: of the picture.
    """
    lines: dict[str, list[Point]] = {}
    for name, (family, rank) in ranks.items():
        found = (results["methods"].get(name, {}).get("shots") or {}).get(shots)
        if found:
            interval = bootstrap(hits(found["best"]), geometric)
            lines.setdefault(family, []).append(Point(rank, interval.value, (interval.low, interval.high)))
    lines = {family: sorted(points, key=lambda each: each.x) for family, points in lines.items() if len(points) > 1}
    return _lines(lines, "rank", shots, path)


class Point(NamedTuple):
    """Of a line, with the interval of y where it is known."""

    x: int
    y: float
    interval: tuple[float, float] | None = None


def _lines(lines: Mapping[str, Sequence[Point]], label: str, shots: str, path: Path) -> bool:
    if not lines:
        return False
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    places = sorted({point.x for points in lines.values() for point in points})
    for i, (name, points) in enumerate(sorted(lines.items(), key=lambda each: -each[1][-1].y)):
        # So that the bars of two families do not hide each other.
        aside = 1 + 0.02 * i * any(point.interval is not None for point in points)
        axes.plot([point.x * aside for point in points], [point.y for point in points], label=name, **_style(i))
        for point in points:
            if point.interval is not None:
                axes.plot([point.x * aside] * 2, point.interval, color=_style(i)["color"], alpha=0.5, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, labels=[str(place) for place in places])
    axes.minorticks_off()
    axes.set(xlabel=label, ylabel="geometric mean of content and style right")
    axes.set_ylim(0, None)
    axes.set_title(f"{shots} style picture{'s' * (shots != '1')}")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _saved(figure, path)
    return True


def _style(index: int) -> dict[str, Any]:
    """Of the lines of a plot in their order."""
    names, kinds = ("color", "marker", "linestyle"), (COLOURS, MARKERS, DASHES)
    return {name: kind[index % len(kind)] for name, kind in zip(names, kinds, strict=True)} | {
        "markersize": 7,
        "alpha": 0.85,
    }


def _saved(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sheet(
    contents: Sequence[np.ndarray],
    styles: Sequence[tuple[str, np.ndarray]],
    made: np.ndarray,
    truth: np.ndarray,
    path: Path,
) -> None:
    """Rows contents, columns styles: what was given at the edges, and in each place the merge beside the true picture.

    Args:
        contents: the content pictures, uint8 `[H, W, 3]`.
        styles: their names with one style picture each.
        made: merges `[contents * styles, H, W, 3]`, the styles fastest.
        truth: likewise.
        path: of the PNG.
    """
    width = CELL + EDGE + len(styles) * (2 * CELL + 2 * EDGE)
    height = HEAD + CELL + EDGE + len(contents) * (CELL + EDGE)
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    pen.text((4, 2), "given", font=font, fill="black")
    for column, (name, picture) in enumerate(styles):
        left = CELL + 2 * EDGE + column * (2 * CELL + 2 * EDGE)
        pen.text((left, 2), f"{name}: merge, true", font=font, fill="black")
        canvas.paste(_cell(picture), (left + CELL // 2, HEAD))
        for row in range(len(contents)):
            top, i = HEAD + CELL + EDGE + row * (CELL + EDGE), row * len(styles) + column
            canvas.paste(_cell(made[i]), (left, top))
            canvas.paste(_cell(truth[i]), (left + CELL, top))
    for row, picture in enumerate(contents):
        canvas.paste(_cell(picture), (0, HEAD + CELL + EDGE + row * (CELL + EDGE)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def _cell(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.BICUBIC)
