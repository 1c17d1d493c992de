"""Pictures of how gated adapters use their experts."""

from collections.abc import Sequence

from qrlora.analysis._draw import (
    FIRST,
    SECOND,
    Line,
    Panel,
    Picture,
    grouped_bars_figure,
    heat_figure,
    lines_figure,
)
from qrlora.analysis._names import Grid, model_order, place_of
from qrlora.analysis._usage import UsageComparison, UsageReport


def usage_pictures(report: UsageReport) -> list[Picture]:
    """A heat map a usage, entropies, mean shares, and for each comparison its difference and cosines."""
    pictures: list[Picture] = []
    for index, usage in enumerate(report.usages):
        figure = heat_figure(_grid(usage.layers, usage.weights), "share", signed=False, numbers=False)
        caption = (
            "How much of each layer's gate goes to each expert (dark: most). Experts are bands of the spectrum, the "
            "strongest singular directions first."
        )
        pictures.append(Picture.of(f"usage-{index + 1}.png", f"Experts of {usage.name}", caption, figure))
    pictures.append(_entropies(report))
    names = [usage.name for usage in report.usages]
    caption = "Mean share of each expert over the layers. Equal bars mean that the gate hardly chooses."
    pictures.append(
        Picture.of(
            "usage-experts.png", "Which experts", caption, grouped_bars_figure(names, report.expert_means, "share")
        )
    )
    for comparison in report.comparisons:
        pictures += _comparison(names, comparison)
    return pictures


def _entropies(report: UsageReport) -> Picture:
    layers = model_order(list(dict.fromkeys(layer for usage in report.usages for layer in usage.layers)))
    panels: list[Panel] = []
    for index, (usage, values) in enumerate(zip(report.usages, report.entropies, strict=True)):
        known = dict(zip(usage.layers, values, strict=True))
        line = Line("entropy", [known.get(layer) for layer in layers], (FIRST, SECOND)[index % 2])
        panels.append(Panel(usage.name, [line], "entropy", limits=(0, 1.05)))
    caption = "1: a layer uses all its experts alike; 0: one expert does everything."
    return Picture.of("usage-entropy.png", "How decided the gates are", caption, lines_figure(layers, panels))


def _comparison(names: Sequence[str], comparison: UsageComparison) -> list[Picture]:
    one, two = names[comparison.first], names[comparison.second]
    stem = f"usage-{comparison.first + 1}-{comparison.second + 1}"
    figure = heat_figure(_grid(comparison.layers, comparison.difference), "difference", signed=True, numbers=False)
    caption = f"Red: {one} leans on that expert more; blue: {two} does."
    different = Picture.of(f"{stem}-difference.png", f"{one} against {two}", caption, figure)
    random = [(comparison.random_mean, comparison.random_std)] * len(comparison.layers)
    line = Line("cosine", comparison.layer_cosines, FIRST, random)
    panel = Panel("cosine of the shares", [line], "cosine", limits=(0, 1.03))
    caption = (
        "1: both gates choose alike. Shares are never negative, so even gates set at random have a cosine of "
        f"{comparison.random_mean:.2f} on average."
    )
    alike = Picture.of(
        f"{stem}-cosine.png", "Alike or not, layer by layer", caption, lines_figure(comparison.layers, [panel])
    )
    return [different, alike]


def _grid(layers: Sequence[str], rows: Sequence[Sequence[float]]) -> Grid:
    """Experts down, layers across."""
    experts = [f"expert {expert + 1}" for expert in range(len(rows[0]))]
    across = [place.block if (place := place_of(layer)) is not None else layer for layer in layers]
    return Grid(experts, across, [list(column) for column in zip(*rows, strict=True)])
