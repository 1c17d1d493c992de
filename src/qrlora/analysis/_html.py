"""The report as one page that needs nothing but itself: pictures as data URIs, no script, no outside address."""

from collections.abc import Sequence
from html import escape

from qrlora.analysis._names import model_order
from qrlora.analysis._pictures import PARTS, SIDES, SIMILARITIES
from qrlora.analysis._report import AdapterFacts, LayerPair, Measure, Pair, Report, Total
from qrlora.analysis._usage import ExpertUsage
from qrlora.analysis._words import chance, is_chance, joined, number, strength_note
from qrlora.pages import Picture, document, figure, table

_GLOSSARY = {
    "Update, ΔW": "What an adapter adds to a layer's weight, the product of its two factors.",
    "Norm": "The size of the update: the root of the sum of its squared entries (Frobenius). In a merge, the adapter "
    "of larger norm times weight wins.",
    "Q and dR": "The frozen basis, derived from the base's weight, and the trained coefficients: ΔW = Q dR. "
    "R = QᵀW is what the base itself has along that basis.",
    "Cosine": "1 for the same direction, −1 for the opposite, 0 for none in common. Independent random matrices of N "
    "entries give 0 ± 1/√N, which for large layers is tiny: a cosine near 0 proves little by itself.",
    "Linear CKA": "Likeness of two matrices up to a rotation of their components, from 0 to 1 (Kornblith et al. 2019).",
    "Mutual information": "How much one matrix's entries tell about the other's at the same places, from 0 to 1, by a "
    "joint histogram with up to 32 bins of equally many entries an axis. Chance is above 0, the more so the fewer "
    "values there are.",
    "Principal angles": "Between the spaces of output (or input) directions of two updates: 0° for a direction both "
    "have, 90° for one that the other lacks. Overlap is their mean squared cosine: the share of the smaller space that "
    "lies in the larger.",
    "Effective rank": "How many directions an update really uses: the exponential of the entropy of its normalised "
    "singular values (Roy and Vetterli 2007).",
    "Random": "The same measure of independent random matrices of the same shapes: mean ± standard deviation. Bold "
    "values lie more than 4 deviations from it.",
}


def page(
    report: Report,
    adapters: Sequence[Sequence[Picture]],
    pairs: Sequence[Sequence[Picture]],
    usage: Sequence[Picture],
) -> str:
    """The whole page.

    Args:
        report: what was found.
        adapters, pairs: the pictures of each adapter and of each pair, in the report's order.
        usage: those of expert usage.
    """
    names = [facts.name for facts in report.adapters]
    title = joined(names)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{_lead(report)}</p>',
        *(f"<p>{escape(note)}</p>" for note in report.notes),
        _adapters_table(report.adapters),
    ]
    body += _matrix(names, report.pairs)
    for pair, pictures in zip(report.pairs, pairs, strict=True):
        body += _pair(names, pair, pictures)
    if report.usage is not None:
        body += ["<h2>Expert usage</h2>", *map(figure, usage)]
    for facts, pictures in zip(report.adapters, adapters, strict=True):
        body += [f"<h2>{escape(facts.name)} by itself</h2>", *map(figure, pictures)]
    body += ["<h2>What the words mean</h2>", _glossary()]
    for pair in report.pairs:
        body += [f"<h2>Every layer: {escape(_title(names, pair))}</h2>", _layers_table(pair)]
    if report.usage is not None:
        for one, entropies in zip(report.usage.usages, report.usage.entropies, strict=True):
            body += [f"<h2>Every layer: experts of {escape(one.name)}</h2>", _usage_table(one, entropies)]
    body.append(_footer(report))
    return document(title, body)


def _lead(report: Report) -> str:
    if len(report.adapters) == 1:
        return "What this adapter does to its base, layer by layer."
    return (
        "How these adapters relate, and what that means for merging them. Every number stands beside what chance gives."
    )


def _adapters_table(adapters: Sequence[AdapterFacts]) -> str:
    rows = [
        [
            escape(" ".join([facts.name, *facts.trigger_words])),
            escape(_kind(facts)),
            str(facts.rank),
            str(len(facts.layers)),
            number(facts.norm),
        ]
        for facts in adapters
    ]
    return table(["adapter", "kind", "rank", "layers", "norm"], rows)


def _kind(facts: AdapterFacts) -> str:
    if facts.basis is None or facts.side is None:
        return facts.basis or "LoRA"
    triangular = ", triangular" if facts.mask == "upper" else ""
    return f"{facts.basis}, {facts.side} side{triangular}"


def _matrix(names: Sequence[str], pairs: Sequence[Pair]) -> list[str]:
    """Cosines of all pairs at once, where there are several."""
    if len(pairs) < 2:
        return []
    cells = [["1" if row == column else "—" for column in range(len(names))] for row in range(len(names))]
    for pair in pairs:
        if "update.cosine" in pair.total:
            text = _value(pair.total["update.cosine"])
            cells[pair.first][pair.second] = cells[pair.second][pair.first] = text
    rows = [[escape(name), *row] for name, row in zip(names, cells, strict=True)]
    return ["<h3>Cosines of the whole updates</h3>", table(["", *map(escape, names)], rows)]


def _pair(names: Sequence[str], pair: Pair, pictures: Sequence[Picture]) -> list[str]:
    warning = strength_note(names, pair)
    notes = [note for note in pair.notes if note != warning]
    return [
        f"<h2>{escape(_title(names, pair))}</h2>",
        f'<p class="warning"><strong>Unequal strength.</strong> {escape(warning)}</p>' if warning else "",
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>",
        *map(figure, pictures[:1]),
        "<h3>In numbers</h3>",
        _totals_table(pair.total),
        *map(figure, pictures[1:]),
    ]


def _title(names: Sequence[str], pair: Pair) -> str:
    return f"{names[pair.first]} and {names[pair.second]}"


def _labels() -> dict[str, str]:
    """Measures in the order of reading, with what a person calls them."""
    labels = {"update.cosine": "update ΔW, cosine"}
    for part in list(PARTS)[1:]:
        labels |= {f"{part}.{kind}": f"{part}, {title}" for kind, title in SIMILARITIES.items()}
    for side, title in SIDES.items():
        labels |= {
            f"{side}.smallest": f"smallest angle, {title}",
            f"{side}.largest": f"largest angle, {title}",
            f"{side}.overlap": f"overlap, {title}",
        }
    return labels


def _totals_table(total: dict[str, Total]) -> str:
    rows = [
        [escape(label), _value(found, name), chance(found), f"{_short(found.min, name)} … {_short(found.max, name)}"]
        for name, label in _labels().items()
        if (found := total.get(name)) is not None
    ]
    return table(["measure", "whole", "random", "layers from … to"], rows)


def _layers_table(pair: Pair) -> str:
    wanted = ["update.cosine", "dR.cka", "dR.nmi", "lora_B.cka", "lora_A.cka", "output.overlap", "input.overlap"]
    shown = [name for name in wanted if name in pair.total]
    heads = ["layer", *(_SHORT[name] for name in shown), "norms"]
    rows = [[escape(entry.layer), *(_cell(entry, name) for name in shown), _norms(entry)] for entry in pair.layers]
    return table(heads, rows, kind="table layers")


def _usage_table(usage: ExpertUsage, entropies: Sequence[float]) -> str:
    known = {layer: [*row, entropy] for layer, row, entropy in zip(usage.layers, usage.weights, entropies, strict=True)}
    heads = ["layer", *(f"expert {expert + 1}" for expert in range(len(usage.weights[0]))), "entropy"]
    rows = [[escape(layer), *(f"{value:.2f}" for value in known[layer])] for layer in model_order(usage.layers)]
    return table(heads, rows, kind="table layers")


_SHORT = {
    "update.cosine": "ΔW cosine",
    "dR.cka": "dR CKA",
    "dR.nmi": "dR mutual inf.",
    "lora_B.cka": "B CKA",
    "lora_A.cka": "A CKA",
    "output.overlap": "output overlap",
    "input.overlap": "input overlap",
}


def _cell(entry: LayerPair, name: str) -> str:
    return _value(entry.measures[name], name) if name in entry.measures else "—"


def _norms(entry: LayerPair) -> str:
    return f"{number(entry.norms[0])} / {number(entry.norms[1])}"


def _value(measure: Measure, name: str = "") -> str:
    """The number, bold where it is no chance; in a table's cell."""
    text = _short(measure.value, name)
    return f"<b>{text}</b>" if is_chance(measure) is False else text


def _short(value: float, name: str) -> str:
    if name.endswith((".smallest", ".largest")):
        return f"{value:.1f}°" if value >= 0.05 or value < 1e-9 else f"{number(value)}°"
    return number(value)


def _glossary() -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in _GLOSSARY.items())
        + "</dl>"
    )


def _footer(report: Report) -> str:
    sources = ", ".join(facts.file for facts in report.adapters if facts.file)
    return (
        f"<footer><p>Made by qrlora analyze{escape(f' from {sources}' if sources else '')}. Random baselines: "
        f"{report.random.draws} draws for each shape, seed {report.random.seed}. All numbers, also those of single "
        "layers, are in report.json.</p></footer>"
    )
