"""The report as one page."""

from collections.abc import Iterable, Sequence
from html import escape

from qrlora.evaluation._report import Estimate, Report
from qrlora.pages import Picture, document, figure, table

_FEW = 10
_WARNING = (
    "Likeness to the pictures that went in is no ground truth. A mere copy of the content picture is perfectly like "
    "it, and a blend that is right differs from both. Read the two likenesses together, compare numbers of one metric "
    "on the same pictures alone, and look at the pictures."
)

_DRIFT = (
    "How far all adapters together move pictures of prompts that have nothing to do with them: 1 minus the mean cosine "
    "of each two pictures of one seed, without and with adapters. 0 has not moved; lower is better. The image "
    "benchmark of peft's method comparison defines it so, with dinov2; other metrics' numbers do not compare with its."
)


def page(report: Report, pictures: Sequence[Picture]) -> str:
    """The whole page.

    Args:
        report: what was found.
        pictures: its figures, in the order of reading.
    """
    title = _title(report)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(report))}</p>',
        f'<p class="warning"><strong>What these numbers are.</strong> {_WARNING}</p>',
        *(f"<p>{escape(note)}</p>" for note in report.notes),
    ]
    body += ["<h2>Pictures and plots</h2>", *map(figure, pictures)] if pictures else []
    if report.groups and report.measures:
        body += ["<h2>In numbers</h2>", _means(report), _uncertainty(report)]
    body += _differences(report)
    body += _drift(report)
    body += ["<h2>What the numbers mean</h2>", _glossary(report)]
    if report.pictures:
        body += ["<h2>Every picture</h2>", _every(report)]
    body.append(
        f"<footer><p>Made by qrlora evaluate. Intervals: percentile bootstrap, 95 %, {report.resamples} resamples, "
        f"seed {report.seed}. All numbers are in report.json.</p></footer>"
    )
    return document(title, body)


def _title(report: Report) -> str:
    parts = [" and ".join(report.content), " and ".join(report.style)]
    told = [part for part in parts if part]
    return f"Evaluation: {' in the style of '.join(told)}" if told else "Evaluation"


def _lead(report: Report) -> str:
    count, groups = len(report.pictures), len(report.groups)
    said = f"{count} picture{'s' if count != 1 else ''}" if count else "Drift alone"
    if groups > 1:
        said += f" in {groups} groups"
    metrics = dict.fromkeys(
        [f"{m.metric} ({m.model})" for m in report.measures.values() if m.metric]
        + [f"{drift.metric} ({drift.model})" for drift in report.drift]
    )
    return f"{said}, by {', '.join(metrics)}." if metrics else f"{said}."


def _means(report: Report) -> str:
    heads = ["group", "pictures", *(escape(measure.title) for measure in report.measures.values())]
    rows = [
        [
            escape(group.name),
            str(sum(row.group == group.name for row in report.pictures)),
            *(_cell(group.means.get(name)) for name in report.measures),
        ]
        for group in report.groups
    ]
    return table(heads, rows)


def _uncertainty(report: Report) -> str:
    counts = [estimate.pictures for group in report.groups for estimate in group.means.values()]
    if max(counts, default=0) < 2:
        return "<p>One picture a group has no interval; more seeds give one.</p>"
    few = (
        f" Of fewer than about {_FEW} pictures such intervals are too narrow, and they are here."
        if min(counts) < _FEW
        else ""
    )
    return (
        "<p>Brackets hold the 95 % bootstrap interval of the mean over the pictures: what other seeds and prompts of "
        f"the same kind would give. It says nothing of other things or styles.{few}</p>"
    )


def _differences(report: Report) -> list[str]:
    if not report.differences:
        return []
    heads = ["group", *(escape(measure.title) for measure in report.measures.values())]
    rows = [
        [escape(each.group), *(_cell(each.means.get(name), signed=True) for name in report.measures)]
        for each in report.differences
    ]
    return [
        f"<h3>Difference from {escape(report.differences[0].base)}</h3>",
        "<p>Picture by picture of the same prompt and seed, then averaged; bold where the interval leaves out 0.</p>",
        table(heads, rows),
    ]


def _drift(report: Report) -> list[str]:
    if not report.drift:
        return []
    rows = [
        [f"{escape(each.metric)} ({escape(each.model)})", str(len(each.prompts)), _cell(each.mean)]
        for each in report.drift
    ]
    return [
        "<h3>Drift</h3>",
        f"<p>{_DRIFT}</p>",
        table(["metric", "prompts", "drift"], rows),
    ]


def _glossary(report: Report) -> str:
    parts: list[str] = []
    for measure in report.measures.values():
        better = "higher is better" if measure.better == "higher" else "lower is better"
        span = f"From {_plain(measure.lowest)} to {_plain(measure.highest)}, {better}."
        by = f" By {measure.metric}, {measure.model}." if measure.metric else ""
        other = (
            f" The picture of the other role scores {measure.other:.2f}.".replace("-", "−")
            if measure.other is not None
            else ""
        )
        parts.append(f"<dt>{escape(measure.title)}</dt><dd>{escape(f'{measure.text} {span}{by}{other}')}</dd>")
    return f"<dl>{''.join(parts)}</dl>"


def _every(report: Report) -> str:
    metrics = list(dict.fromkeys(metric for row in report.pictures for metric in row.nearest))
    heads = [
        "picture",
        "group",
        *(escape(measure.title) for measure in report.measures.values()),
        *(f"nearest ({escape(metric)})" for metric in metrics),
    ]
    rows: Iterable[list[str]] = (
        [
            escape(row.name),
            escape(row.group),
            *(_plain(row.scores[name]) if name in row.scores else "—" for name in report.measures),
            *(escape(row.nearest.get(metric, "—")) for metric in metrics),
        ]
        for row in report.pictures
    )
    return table(heads, rows, kind="table layers")


def _cell(estimate: Estimate | None, *, signed: bool = False) -> str:
    if estimate is None:
        return "—"
    mean = _plain(estimate.mean, signed=signed)
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return mean  # where all pictures agree, resampling them can tell nothing
    text = f"{mean}<br>[{_plain(estimate.low, signed=signed)},&nbsp;{_plain(estimate.high, signed=signed)}]"
    return f"<b>{text}</b>" if signed and (estimate.low > 0 or estimate.high < 0) else text


def _plain(value: float, *, signed: bool = False) -> str:
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return (text.rstrip("0").rstrip(".") if value == int(value) else text).replace("-", "−")
