"""Tables of a stage's results, as Markdown: beside the results, and in docs/fusion.md."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fusion.statistics import bootstrap, difference, geometric
from qrlora.formats import atomic_write

COLUMNS = {
    "content": "content right",
    "style": "style right",
    "both": "both right",
    "feature": "feature distance",
    "look": "look distance",
    "pixels": "pixel distance",
    "drift": "drift",
}
AGAINST = "lora"
LESS = {"geometric": "geometric mean", "both": "both", "feature": "feature distance", "look": "look distance"}
Results = Mapping[str, Any]


def tables(results: Results) -> str:
    """Everything a stage found, as Markdown."""
    lines = [f"`{results['command']}`", "", _about(results), ""]
    for shots in results["stage"]["shots"]:
        plural = "" if shots == 1 else "s"
        for which, words in (("even", "weights (1, 1)"), ("best", "each method's best weights on dev")):
            lines += [f"### {shots} style picture{plural}, {words}", "", *score_table(results, str(shots), which), ""]
        lines += [f"### Against plain LoRA on the same pairs, {shots} style picture{plural}", ""]
        lines += [*difference_table(results, str(shots)), ""]
    lines += ["### Against plain LoRA, for other contents or other styles", "", *carried_table(results), ""]
    lines += ["### Each adapter alone, and the learning rates that were chosen", "", *alone_table(results), ""]
    return "\n".join(lines)


def short_tables(results: Results) -> str:
    """What a document needs of it: the shares and how far each method is from plain LoRA, a line a method."""
    lines = [_about(results), ""]
    for shots in map(str, results["stage"]["shots"]):
        found = {name: each["shots"][shots] for name, each in results["methods"].items() if each.get("shots")}
        heads = [
            f"{shots} style picture{'s' * (shots != '1')}",
            "weights",
            "content right",
            "style right",
            "both right",
        ]
        if AGAINST in found:
            heads += [
                f"{words}, less plain LoRA's"
                for words in ("geometric mean", "both", "feature distance", "look distance")
            ]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        rows = [(name, which) for name in found for which in ("even", "best")]
        rows = [(name, which) for name, which in rows if which == "best" or list(found[name]["weights"]) != [1.0, 1.0]]
        for name, which in sorted(rows, key=lambda row: -share(found[row[0]][row[1]])):
            each = found[name]
            words = "{:g}, {:g}".format(*(each["weights"] if which == "best" else (1, 1)))
            cells = [_label(results, name), words, *_cells(each[which], ["content", "style", "both"])]
            if AGAINST in found:
                cells += [
                    _less(each[which], found[AGAINST][which], key) for key in ("geometric", "both", "feature", "look")
                ]
            lines.append(f"| {' | '.join(cells)} |")
        for name, scores in results.get("references", {}).items():
            blank = [""] * len(LESS) * (AGAINST in found)
            cells = [f"*{name}*", "", *_cells(scores, ["content", "style", "both"]), *blank]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _less(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]], key: str) -> str:
    if one is other:
        return ""
    if key == "geometric":
        return _signed(difference(hits(one), hits(other), geometric))
    return _signed(difference(np.asarray(one[key]), np.asarray(other[key])))


def _about(results: Results) -> str:
    stage, classifier = results["stage"], results["classifier"]
    pairs, contents, styles = len(results["pairs"]), stage["contents"], stage["styles"]
    seeds, draws = len(stage["seeds"]), stage["draws"]
    shown = f", {classifier['shown']:.2f} as the autoencoder shows them" if classifier["shown"] is not None else ""
    styles_of = " or ".join(f"{stage['steps']['style'][str(k)]} ({k} pictures)" for k in stage["shots"])
    styles_of = styles_of.replace("(1 pictures)", "(1 picture)")
    return (
        f"Base {results['base']}; torch {results['versions']['torch']}, {results['machine']}. {stage['split']}: "
        f"{contents} contents x {styles} styles = {pairs} pairs, {seeds} seed{'s' * (seeds > 1)}"
        f"{f', {draws} pictures each' if draws > 1 else ''}; "
        f"{stage['steps']['content']} steps of {stage['batch']} for a content, {styles_of} for a style, "
        f"rank {stage['rank']} unless said. Content among {results['candidates']}; the style classifier is right on "
        f"{classifier['true']:.2f} of the true pictures{shown}. "
        "Intervals: 95 %, bootstrap over pairs."
    )


def score_table(results: Results, shots: str, which: str) -> list[str]:
    """One line a method, best objective first, then ceilings and floors."""
    names = [*COLUMNS]
    lines = [f"| | weights | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(names)]
    found = {name: each["shots"][shots] for name, each in results["methods"].items() if each.get("shots")}
    for name in sorted(found, key=lambda each: -share(found[each][which])):
        weights = found[name]["weights"] if which == "best" else (1, 1)
        words = f"{weights[0]:g}, {weights[1]:g}"
        lines.append(f"| {_label(results, name)} | {words} | {' | '.join(_cells(found[name][which], names))} |")
    for name, scores in results.get("references", {}).items():
        lines.append(f"| *{name}* | | {' | '.join(_cells(scores, names))} |")
    return lines


def _label(results: Results, name: str) -> str:
    return f"**{name}**: {results['methods'][name]['about']}"


def _cells(scores: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[str]:
    return [str(bootstrap(np.asarray(scores[name]))) if name in scores else "" for name in names]


def share(scores: Mapping[str, Sequence[float]]) -> float:
    """The geometric mean of content right and style right."""
    return float(geometric(hits(scores)))


def hits(scores: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Content right and style right, `[pairs, 2]`."""
    return np.stack([np.asarray(scores["content"]), np.asarray(scores["style"])], axis=1)


def difference_table(results: Results, shots: str) -> list[str]:
    """Each method less plain LoRA, pair by pair: the interval tells whether it is more than chance."""
    found = {name: each["shots"][shots] for name, each in results["methods"].items() if each.get("shots")}
    if AGAINST not in found:
        return ["Plain LoRA is not among these results."]
    lines = ["| | weights | geometric mean | both right | feature distance | look distance |", "|---" * 6 + "|"]
    for name in found:
        if name == AGAINST:
            continue
        for which, words in (("even", "1, 1"), ("best", "best")):
            one, other = found[name][which], found[AGAINST][which]
            values = [difference(hits(one), hits(other), geometric)]
            values += [difference(np.asarray(one[k]), np.asarray(other[k])) for k in ("both", "feature", "look")]
            lines.append(f"| {name} | {words} | {' | '.join(_signed(each) for each in values)} |")
    return lines


def carried_table(results: Results) -> list[str]:
    """The differences at the best weights with whole contents, or whole styles, drawn again: how far they carry."""
    contents, styles = zip(*results["pairs"], strict=True)
    lines = ["| | style pictures | drawn again | geometric mean | both right | look distance |", "|---" * 6 + "|"]
    for name, each in results["methods"].items():
        against = results["methods"].get(AGAINST, {}).get("shots")
        for shots in each.get("shots") or () if name != AGAINST and against else ():
            one, other = each["shots"][shots]["best"], against[shots]["best"]
            for words, groups in (("contents", contents), ("styles", styles)):
                if len(set(groups)) < 2:
                    continue  # one group has no spread
                values = [difference(hits(one), hits(other), geometric, groups=groups)]
                values += [
                    difference(np.asarray(one[k]), np.asarray(other[k]), groups=groups) for k in ("both", "look")
                ]
                told = " | ".join(_signed(value) for value in values)
                lines.append(f"| {name} | {shots} | {words} | {told} |")
    return lines


def _signed(interval: Any) -> str:
    text = f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
    return f"**{text}**" if interval.low > 0 or interval.high < 0 else text


def alone_table(results: Results) -> list[str]:
    """How well each adapter does its own part, without the other."""
    heads = ["", "learning rate", "tried (objective)", "content alone: right", "its feature distance"]
    heads += ["style alone: right", "its look distance"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, each in results["methods"].items():
        if not each.get("shots"):
            lines.append(f"| {name} | diverged at every rate | | | | | |")
            continue
        tried = [f"{rate} ({_objective(found)})" for rate, found in each.get("rates", {}).items()]
        some = {int(k): s["alone"] for k, s in each["shots"].items()}
        content = some[min(some)]["content"]
        style = ", ".join(f"{some[k]['style']['style']:.2f} ({k})" for k in sorted(some))
        look = ", ".join(f"{some[k]['style']['look']:.2f} ({k})" for k in sorted(some))
        cells = [f"{each['rate']:g}", ", ".join(tried), f"{content['content']:.2f}", f"{content['feature']:.2f}"]
        lines.append(f"| {name} | {' | '.join([*cells, style, look])} |")
    return lines


def _objective(found: Mapping[str, Any]) -> str:
    return "diverged" if "diverged" in found else f"{found['objective'][0]:.2f}"


def merge_tables(results: Results, plain: Results, about: Callable[[str], str]) -> str:
    """Ways to merge, beside the plain sum of the same adapters.

    Args:
        results: of the stage `merges`: by method, merge and shots.
        plain: of the screen.
        about: what a merge is, by its name.
    """
    lines = [f"`{results['command']}`", ""]
    for name, merges in results["methods"].items():
        rows = {"exact": plain["methods"][name]["shots"], **merges}
        for shots in results["stage"]["shots"]:
            lines += [f"### Adapters of {name}, {shots} style picture{'s' * (shots > 1)}", ""]
            lines += [
                f"| merge | seconds | weights | {' | '.join(COLUMNS.values())} |",
                "|---" * (3 + len(COLUMNS)) + "|",
            ]
            for merge, found in rows.items():
                each = found[str(shots)]
                for which, weights in (("even", (1, 1)), ("best", each["weights"])):
                    cells = " | ".join(_cells(each[which], [*COLUMNS]))
                    words = f"{weights[0]:g}, {weights[1]:g}"
                    cost = f"{each['seconds']:.2g}" if "seconds" in each else ""
                    lines.append(f"| **{merge}**: {about(merge)} | {cost} | {words} | {cells} |")
            lines.append("")
    return "\n".join(lines)


def short_merge_tables(results: Results, plain: Results, about: Callable[[str], str]) -> str:
    """The same for a document: each merge at its best weights on dev, and how far it is from the sum there."""
    lines: list[str] = []
    for name, merges in results["methods"].items():
        rows = {"exact": plain["methods"][name]["shots"], **merges}
        lines += [f"Adapters of **{name}**:", "", f"| merge | seconds | {_short_heads(results)} |"]
        lines.append("|---" * (2 + 5 * len(results["stage"]["shots"])) + "|")
        for merge, found in rows.items():
            cells = [f"**{merge}**: {about(merge)}"]
            seconds = [each["seconds"] for each in found.values() if "seconds" in each]
            cells.append(f"{max(seconds):.2g}" if seconds else "")
            for shots in map(str, results["stage"]["shots"]):
                best, its = found[shots]["best"], rows["exact"][shots]["best"]
                cells += ["{:g}, {:g}".format(*found[shots]["weights"])]
                cells += [f"{float(np.mean(best[key])):.2f}" for key in ("content", "style", "both")]
                cells.append(_less(best, its, "both"))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _short_heads(results: Results) -> str:
    heads = ("weights", "content", "style", "both", "both, less the sum's")
    return " | ".join(f"{shots}: {head}" for shots in results["stage"]["shots"] for head in heads)


def put_between(path: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->` in a document that has them."""
    if not path.exists():
        return
    whole = path.read_text(encoding="utf-8")
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if start in whole and end in whole:
        head, tail = whole.split(start)[0], whole.split(end)[1]
        atomic_write(path, f"{head}{start}\n\n{text.strip()}\n\n{end}{tail}")
