"""Writes what the results of a stage say: tables, plots, a sheet a method, and the tables in docs/fusion.md."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fusion import plots
from benchmarks.fusion.bench import Bench
from benchmarks.fusion.cells import Cell
from benchmarks.fusion.config import EXACT
from benchmarks.fusion.report import merge_tables, put_between, short_merge_tables, short_tables, tables
from benchmarks.fusion.store import NotThereYet
from qrlora.formats import atomic_write

ROWS = 12
DOCUMENT = Path("docs/fusion.md")


def publish(bench: Bench, results: dict[str, Any], folder: Path, name: str, document: Path = DOCUMENT) -> list[Path]:
    """All of one stage's files.

    Args:
        bench: of the stage, computing nothing: sheets are made of what is in the store.
        results: of the stage.
        folder: for the files.
        name: of the stage; files begin with it.
        document: gets the short tables between its `<!-- name -->` marks.

    Returns:
        The files written.
    """
    text = tables(results)
    written = [atomic_write(folder / f"{name}.md", f"# The fusion benchmark: {name}\n\n{text}\n")]
    put_between(document, name, short_tables(results))
    ranks = {
        key: (method.family, method.spec("content", bench.stage.rank, 0).rank)
        for key, method in bench.plan.methods.items()
        if method.family is not None
    }
    for shots in map(str, bench.stage.shots):
        if any(len(each.get("frontier", [])) > 1 for each in _shots(results, shots)):
            plots.frontier(results, shots, folder / f"{name}-frontier-{shots}.png")
            written.append(folder / f"{name}-frontier-{shots}.png")
        for kind, drawn in (
            ("steps", plots.against_steps(results, shots, folder / f"{name}-steps-{shots}.png")),
            ("rank", plots.against_rank(results, shots, ranks, folder / f"{name}-rank-{shots}.png")),
        ):
            if drawn:
                written.append(folder / f"{name}-{kind}-{shots}.png")
    for method, found in results["methods"].items():
        if found.get("shots"):
            written += _sheets(bench, method, found, folder / "sheets", name)
    return written


def publish_merges(
    bench: Bench, results: dict[str, Any], plain: dict[str, Any], folder: Path, name: str, document: Path = DOCUMENT
) -> Path:
    """The table of ways to merge, likewise."""

    def about(merge: str) -> str:
        return bench.plan.merge(merge).about

    text = merge_tables(results, plain, about)
    put_between(document, f"{name}-merges", short_merge_tables(results, plain, about))
    return atomic_write(folder / f"{name}-merges.md", f"# Ways to merge: {name}\n\n{text}\n")


def _shots(results: dict[str, Any], shots: str) -> list[dict[str, Any]]:
    return [each["shots"][shots] for each in results["methods"].values() if each.get("shots")]


def _sheets(bench: Bench, method: str, found: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """A sheet from the most style pictures, at the best weights, the first of each pair; none if not in the store."""
    emoji, splits = bench.emoji, bench.splits
    rows, shots = min(ROWS, len(bench.contents)), max(found["shots"], key=int)
    weights = (float(found["shots"][shots]["weights"][0]), float(found["shots"][shots]["weights"][1]))
    try:
        made = bench.pictures(Cell(method, found["rate"], int(shots), EXACT, weights))
    except NotThereYet:
        return []
    first = splits.style_pictures(int(shots), 0)[0]
    path = folder / f"{name}-{method}-{shots}.png"
    plots.sheet(
        [emoji[content, splits.content_style] for content in bench.contents[:rows]],
        [(style, emoji[first, style]) for style in bench.styles],
        made[:: bench.repeats][: rows * len(bench.styles)],
        np.stack([emoji[pair] for pair in bench.pairs[: rows * len(bench.styles)]]),
        path,
    )
    return [path]
