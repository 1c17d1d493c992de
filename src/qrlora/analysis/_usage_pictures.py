"""Pictures of how gated adapters use their experts."""

from collections.abc import Mapping, Sequence

from qrlora.analysis._draw import (
    Line,
    Panel,
    grouped_bars_figure,
    heat_figure,
    lines_figure,
)
from qrlora.analysis._names import Grid, model_order, place_of
from qrlora.analysis._usage import ExpertUsage, UsageComparison, UsageReport
from qrlora.pages import FIRST, SECOND, Picture


def usage_pictures(report: UsageReport) -> list[Picture]:
    """A heat map a usage, entropies, mean shares, and for each comparison its difference and cosines."""
    pictures: list[Picture] = []
    top = max(share for usage in report.usages for row in usage.weights for share in row)
    for index, usage in enumerate(report.usages):
        grid = _grid(dict(zip(usage.layers, usage.weights, strict=True)))
        figure = heat_figure(grid, "share", signed=False, numbers=False, top=top)
        caption = (
            "A column is a layer: how much of its gate goes to each expert, on average over all tokens (dark: most). "
            f"Experts are bands of the spectrum, the strongest singular directions first.{_drawn(usage)}"
        )
        pictures.append(Picture.of(f"usage-{index + 1}.png", f"Experts of {usage.name}", caption, figure))
    pictures.append(_entropies(report))
    names = [usage.name for usage in report.usages]
    caption = (
        "Mean share of each expert over the layers. Bars are alike where gates hardly choose, and also where each "
        "layer chooses another expert: the maps above tell which."
    )
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
    caption = (
        "Entropy of the shares above. 1: a layer uses all its experts alike, over all tokens; 0: one expert does "
        "everything."
    )
    return Picture.of("usage-entropy.png", "How evenly the experts are used", caption, lines_figure(layers, panels))


def _comparison(names: Sequence[str], comparison: UsageComparison) -> list[Picture]:
    one, two = names[comparison.first], names[comparison.second]
    stem = f"usage-{comparison.first + 1}-{comparison.second + 1}"
    grid = _grid(dict(zip(comparison.layers, comparison.difference, strict=True)))
    figure = heat_figure(grid, "difference of shares", signed=True, numbers=False)
    caption = f"A column is a layer. Red: {one} leans on that expert more; blue: {two} does."
    different = Picture.of(f"{stem}-difference.png", f"{one} against {two}", caption, figure)
    random = [(comparison.random_mean, comparison.random_std)] * len(comparison.layers)
    cosines = dict(zip(comparison.layers, comparison.layer_cosines, strict=True))
    layers = model_order(comparison.layers)
    line = Line("cosine", [cosines[layer] for layer in layers], FIRST, random)
    panel = Panel("cosine of the shares", [line], "cosine", limits=(0, 1.03))
    caption = (
        "1: both gates choose alike. Shares are never negative, so even gates set at random have a cosine of "
        f"{comparison.random_mean:.2f} on average, and mostly lie within the grey."
    )
    alike = Picture.of(f"{stem}-cosine.png", "Alike or not, layer by layer", caption, lines_figure(layers, [panel]))
    return [different, alike]


def _drawn(usage: ExpertUsage) -> str:
    if not usage.prompts:
        return ""
    more = f" and {len(usage.prompts) - 1} more" if len(usage.prompts) > 1 else ""
    return f" Recorded while the model drew “{usage.prompts[0]}”{more}."


def _grid(rows: Mapping[str, Sequence[float]]) -> Grid:
    """Experts down, layers across, in the order of all pictures of layers."""
    layers = model_order(list(rows))
    experts = [f"expert {expert + 1}" for expert in range(len(rows[layers[0]]))]
    across = [place.block if (place := place_of(layer)) is not None else layer for layer in layers]
    return Grid(experts, across, [list(column) for column in zip(*(rows[layer] for layer in layers), strict=True)])
