"""Which pictures a report has, with their titles and what to see in them."""

from collections.abc import Sequence

from qrlora.analysis._draw import (
    Bar,
    Line,
    Panel,
    bars_figure,
    heat_figure,
    lines_figure,
    spectra_figure,
)
from qrlora.analysis._names import grid_of
from qrlora.analysis._report import AdapterFacts, LayerPair, Measure, Pair
from qrlora.analysis._words import number
from qrlora.pages import FAINT, FIRST, SECOND, Picture

PARTS = {
    "update": "update ΔW",
    "dR": "coefficients dR",
    "Q": "basis Q",
    "R": "base R",
    "lora_B": "lora_B",
    "lora_A": "lora_A",
    "gate": "gate weights",
}
SIMILARITIES = {"cosine": "cosine", "cka": "linear CKA", "nmi": "mutual information"}
SIDES = {"output": "output side", "input": "input side"}
_EXPLAINED = {
    "cosine": "Where the two point the same way (above 0) or against each other (below 0). A line within the grey band "
    "is what two unrelated matrices give.",
    "cka": "Likeness up to a rotation of the components: 1 is the same, and the grey band is unrelated.",
    "nmi": "How much the entries of one tell about those of the other, in any form, not only along a line: 1 is "
    "everything. The grey band is not at 0, since a histogram of few values is never flat.",
}


def adapter_pictures(index: int, facts: AdapterFacts) -> list[Picture]:
    """Norms and effective ranks of one adapter's layers, and its spectra."""
    layers = [entry.layer for entry in facts.layers]
    norms = Panel(
        "norm of the update", [Line("norm", [entry.norm or None for entry in facts.layers], FIRST)], "‖ΔW‖", log=True
    )
    ranks = Panel(
        "effective rank",
        [
            Line("effective", [entry.effective_rank for entry in facts.layers], FIRST),
            Line("stored rank", [entry.rank for entry in facts.layers], FAINT),
        ],
        "rank",
        limits=(0, 1.08 * facts.rank),
    )
    stem = f"adapter-{index + 1}"
    pictures = [
        Picture.of(
            f"{stem}-layers.png",
            f"{facts.name}, layer by layer",
            "Above: how strongly each layer is changed. Below: how many directions the change really uses; as many as "
            "the rank where all weigh the same, 1 where one does everything.",
            lines_figure(layers, [norms, ranks]),
        )
    ]
    grid = grid_of({entry.layer: entry.norm for entry in facts.layers})
    if grid is not None:
        caption = "The same norms by block (across) and module (down): where in the model the adapter works."
        pictures.append(
            Picture.of(
                f"{stem}-norms.png", f"Where {facts.name} works", caption, heat_figure(grid, "‖ΔW‖", signed=False)
            )
        )
    spectra = [[value / entry.spectrum[0] for value in entry.spectrum] for entry in facts.layers if entry.norm]
    if spectra:
        caption = "Singular values of each layer's update over its largest, one line a layer, the median in front."
        pictures.append(
            Picture.of(f"{stem}-spectrum.png", f"Spectra of {facts.name}", caption, spectra_figure(spectra))
        )
    return pictures


def pair_pictures(names: Sequence[str], pair: Pair) -> list[Picture]:
    """Summary, similarities, angles, norms and where they are, of two adapters."""
    one, two = names[pair.first], names[pair.second]
    stem, layers = f"pair-{pair.first + 1}-{pair.second + 1}", [entry.layer for entry in pair.layers]
    pictures: list[Picture] = []
    if pair.total:
        caption = (
            "Whole adapters: blue bars are these two, grey marks what random matrices of the same shapes give. A bar "
            "that ends at its mark says nothing; one well beyond it is a real likeness."
        )
        pictures.append(Picture.of(f"{stem}-summary.png", "At a glance", caption, bars_figure(summary_bars(pair))))
    norms = [
        Line(name, [entry.norms[which] or None for entry in pair.layers], color)
        for which, (name, color) in enumerate(((one, FIRST), (two, SECOND)))
    ]
    caption = "How strongly each changes each layer. Where one line runs far below the other, a merge will not show it."
    figure = lines_figure(layers, [Panel("norms of the updates", norms, "‖ΔW‖", log=True)])
    pictures.append(Picture.of(f"{stem}-norms.png", "Strength", caption, figure))
    same = _same_parts(pair)
    for kind, title in SIMILARITIES.items():
        panels = [
            Panel(label, [_line(pair.layers, f"{part}.{kind}", title, FIRST)], title)
            for part, label in PARTS.items()
            if f"{part}.{kind}" in pair.total and part not in same
        ]
        caption = _EXPLAINED[kind] + (f" Not drawn: {' and '.join(same)}, the same in every layer." if same else "")
        if panels:
            figure = lines_figure(layers, panels)
            pictures.append(Picture.of(f"{stem}-{kind}.png", title[0].upper() + title[1:], caption, figure))
    pictures += _where_and_angles(stem, layers, pair)
    return pictures


def _where_and_angles(stem: str, layers: Sequence[str], pair: Pair) -> list[Picture]:
    pictures: list[Picture] = []
    cosines = {
        entry.layer: entry.measures["update.cosine"].value for entry in pair.layers if "update.cosine" in entry.measures
    }
    grid = grid_of(cosines)
    if grid is not None:
        caption = (
            "Cosine of the updates by block (across) and module (down): red adds up in a merge, blue "
            "cancels. Blank: no such layer."
        )
        figure = heat_figure(grid, "cosine", signed=True)
        pictures.append(Picture.of(f"{stem}-where.png", "Where they meet", caption, figure))
    panels = [
        Panel(
            label,
            [
                _line(pair.layers, f"{side}.largest", "largest", SECOND),
                _line(pair.layers, f"{side}.smallest", "smallest", FIRST),
            ],
            "degrees",
            limits=(-3, 93),
        )
        for side, label in SIDES.items()
        if f"{side}.smallest" in pair.total
    ]
    if panels:
        caption = (
            "Principal angles between the spaces the two updates write to (output) and read from (input). 0° is a "
            "shared direction, 90° none. A shared basis has 0° on its side by construction."
        )
        pictures.append(Picture.of(f"{stem}-angles.png", "Angles", caption, lines_figure(layers, panels)))
    return pictures


def _same_parts(pair: Pair) -> list[str]:
    """Parts that are equal in every layer, as the bases of adapters of one base are: a line at 1 shows nothing."""
    cosines = {part: pair.total.get(f"{part}.cosine") for part in PARTS}
    return [part for part, cosine in cosines.items() if cosine is not None and cosine.min > 1 - 1e-6]


def summary_bars(pair: Pair) -> list[Bar]:
    """Every measure between -1 and 1 of two whole adapters, updates first."""
    wanted = {"update.cosine": "update, cosine"}
    for part in list(PARTS)[1:]:
        for kind, title in SIMILARITIES.items():
            wanted[f"{part}.{kind}"] = f"{part}, {title}"
    for side, title in SIDES.items():
        wanted[f"{side}.overlap"] = f"overlap, {title}"
    return [
        Bar(label, pair.total[name].value, number(pair.total[name].value), _chance(pair.total[name]))
        for name, label in wanted.items()
        if name in pair.total
    ]


def _line(layers: Sequence[LayerPair], name: str, label: str, color: str) -> Line:
    measures = [entry.measures.get(name) for entry in layers]
    values = [measure.value if measure is not None else None for measure in measures]
    return Line(label, values, color, [_chance(measure) if measure is not None else None for measure in measures])


def _chance(measure: Measure) -> tuple[float, float] | None:
    if measure.random_mean is None or measure.random_std is None:
        return None
    return measure.random_mean, measure.random_std
