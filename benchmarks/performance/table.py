"""Results as JSON, one file a row, and as one table: on the terminal, in the results and in the documentation."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.performance._measure import ROOT
from benchmarks.performance._row import Found, Row
from benchmarks.performance.rows import ROWS

RESULTS = ROOT / "benchmarks" / "results" / "performance"
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- table of benchmarks.performance -->", "<!-- end of the table -->"
TABLE = "table.md"
PICTURES = {
    "targets.png": "How near each target is",
    "layer.png": "Forward and backward of an adapted layer over the frozen one",
    "growth.png": "How time and memory grow",
}
NO_GPU = "no CUDA device"
COLUMNS = ("row", "what", "against", "target", "measured", "peers in the same run", "met")

Result = dict[str, Any]


def result_of(row: Row, found: Found, about: Mapping[str, Any]) -> Result:
    """Everything that is kept of a row; `about` is how it was run."""
    goals = [{**asdict(goal), "value": float(f"{goal.value:.4g}"), "met": goal.met} for goal in found.goals]
    kept = {key: getattr(found, key) for key in ("measured", "peers", "limit")}
    return {"row": row.name, "target": row.target, **about, **kept, "goals": goals, "details": found.details}


def write_result(result: Result, folder: Path) -> None:
    """A row's file, in place of its earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['row']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read_results(folder: Path) -> dict[str, Result]:
    """All rows measured so far, in the order of the table."""
    paths = {name: folder / f"{name}.json" for name in ROWS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def verdict(result: Result) -> str:
    """ "met", or how far and what the operations and bytes allow."""
    goals = result["goals"]
    missed = [goal for goal in goals if not goal["met"]]
    if not goals:
        return ""
    if not missed:
        return "met"
    told = ", ".join(f"{goal['what']} {goal['value']:.3g}" for goal in missed)
    return f"{len(goals) - len(missed)} of {len(goals)} met; not: {told}. Limit: {result['limit']}"


def cells(row: Row, result: Result | None) -> tuple[str, ...]:
    """One line of the table."""
    if result is None:
        missing = NO_GPU if row.device == "cuda" else "not measured"
        return (row.name, row.what, row.against, row.target, missing, "", "")
    return (row.name, row.what, row.against, row.target, result["measured"], result["peers"], verdict(result))


def markdown(results: Mapping[str, Result]) -> str:
    """The whole table, and what it was measured with."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cells(row, results.get(name)))} |" for name, row in ROWS.items()]
    return "\n".join([*lines, "", *settings(results)]) + "\n"


def settings(results: Mapping[str, Result]) -> list[str]:
    """One sentence for all rows that were measured in the same way."""
    groups: dict[str, list[str]] = {}
    for name, result in results.items():
        about = result["machine"]
        place = about.get("gpu") or f"{about['processor']}, {about['threads']} of {about['cores']} cores"
        packages = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
        groups.setdefault(f"{place}, {about['memory_gib']} GiB, {about['system']}; {packages}", []).append(name)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [f"{', '.join(f'`{name}`' for name in names)}: {told}." for told, names in ordered]


def write_table(folder: Path, document: Path | None) -> None:
    """`table.md` beside the results and their pictures, and the same between the markers of the document.

    Raises:
        ValueError: the document has no markers.
    """
    text = markdown(read_results(folder))
    (folder / TABLE).write_text(
        f"# Speed and memory\n\n`make bench`\n\n{text}{_pictures(folder, '')}", encoding="utf-8"
    )
    if document is None:
        return
    text += _pictures(folder, f"{os.path.relpath(folder, document.parent)}/")
    page = document.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{document} lacks the lines {BEGIN} and {END}")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    document.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def _pictures(folder: Path, path: str) -> str:
    """Links to those that were drawn."""
    return "".join(f"\n![{what}]({path}{name})\n" for name, what in PICTURES.items() if (folder / name).is_file())


def plain(results: Mapping[str, Result], skipped: Mapping[str, str], chosen: list[str]) -> str:
    """For the terminal: a paragraph a row."""
    paragraphs = []
    for name in chosen:
        row = ROWS[name]
        _, what, against, target, measured, peers, said = cells(row, results.get(name))
        lines = [f"{name}: {what}" + (f", against {against}" if against else "")]
        lines += [
            f"  {label:9}{text}"
            for label, text in (("target", target), ("measured", measured), ("peers", peers))
            if text
        ]
        lines += [f"  {said}"] if said else []
        lines += [f"  not measured now: {skipped[name]}"] if name in skipped else []
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)
