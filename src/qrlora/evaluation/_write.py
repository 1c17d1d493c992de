"""A report as a folder."""

from collections.abc import Sequence
from pathlib import Path

from qrlora.evaluation._figures import gallery_figure, map_figure, means_figure, weights_figure
from qrlora.evaluation._html import page
from qrlora.evaluation._layout import MOST_ROWS, WeightGrid, main_measure, weight_grid
from qrlora.evaluation._report import Report
from qrlora.evaluation._samples import DriftPair, Sample
from qrlora.evaluation._sheets import (
    MOST_PICTURES,
    drift_figure,
    grid_figure,
    pictures_figure,
    references_figure,
)
from qrlora.formats import atomic_write
from qrlora.pages import Picture


def write_report(
    report: Report,
    folder: str | Path,
    pictures: Sequence[Sample] = (),
    *,
    content: Sequence[Sample] = (),
    style: Sequence[Sample] = (),
    drift: Sequence[DriftPair] = (),
) -> Path:
    """Write `report.html`, its figures as PNG files, and `report.json`.

    Args:
        report: by `evaluate`.
        folder: made where it is missing; files of the same names are replaced.
        pictures, content, style, drift: what it was made from, to be shown; left out where not given.

    Returns:
        The path of `report.html`, which is written last and holds its figures itself.

    Raises:
        QrloraError: a file cannot be written.
    """
    target = Path(folder)
    grid = weight_grid(report)
    figures = [
        *_shown(report, pictures, [("content", each) for each in content] + [("style", each) for each in style], grid),
        *_plots(report, grid),
    ]
    if drift and report.drift:
        figures.append(
            Picture.of(
                "drift.png",
                "Drift",
                "Prompts that have nothing to do with the adapters, at the same seeds, without them (above) and with "
                "all of them. The numbers are 1 − cosine: 0 has not moved.",
                drift_figure(drift, report.drift),
            )
        )
    for picture in figures:
        atomic_write(target / picture.file, picture.content)
    atomic_write(target / "report.json", report.model_dump_json(indent=1))
    return atomic_write(target / "report.html", page(report, figures))


def _shown(
    report: Report, pictures: Sequence[Sample], references: Sequence[tuple[str, Sample]], grid: WeightGrid | None
) -> list[Picture]:
    """What was compared, and what with."""
    figures: list[Picture] = []
    if references:
        figures.append(
            Picture.of(
                "references.png",
                "Compared with",
                "The pictures that the scores measure likeness to.",
                references_figure(references),
            )
        )
    if not pictures:
        return figures
    shown = [name for name in (main_measure(report, "content"), main_measure(report, "style")) if name is not None]
    if grid is not None:
        caption = (
            f"The weight of {grid.names[0]} grows downwards, that of {grid.names[1]} to the right; likeness to the "
            "content and to the style picture stand under each."
        )
        figures.append(Picture.of("pictures.png", "Pictures", caption, grid_figure(pictures, report, grid, shown)))
        return figures
    caption = "Each with its likeness to the content and to the style picture, where they were given."
    if len(pictures) > MOST_PICTURES:
        caption += f" The first {MOST_PICTURES} of {len(pictures)}."
    figures.append(Picture.of("pictures.png", "Pictures", caption, pictures_figure(pictures, report, shown)))
    return figures


def _plots(report: Report, grid: WeightGrid | None) -> list[Picture]:
    figures: list[Picture] = []
    across, up = main_measure(report, "content"), main_measure(report, "style")
    if across is not None and up is not None:
        how = (
            f"A line is one weight of {grid.names[0]}; along it the weight of {grid.names[1]} grows with the points, "
            f"from {grid.columns[0]:g} to {grid.columns[-1]:g}."
            if grid is not None
            else "A small point is a picture, a large one the mean of a group."
        )
        caption = (
            f"Right is more like the content, up more like the style. {how} Stars are the given pictures themselves, "
            "which is where mere copies would lie; a blend is wanted far from both axes and from both stars."
        )
        figures.append(
            Picture.of("content-style.png", "Content against style", caption, map_figure(report, across, up, grid))
        )
    if grid is not None and report.measures:
        caption = "The mean of every measure at each pair of weights; bright is better."
        figures.append(
            Picture.of("weights.png", "By weights", caption, weights_figure(report, grid, list(report.measures)))
        )
    elif report.measures and len(report.groups) <= MOST_ROWS:
        caption = (
            "Ticks are pictures, points their means, bars the 95 % bootstrap intervals of the means. The dashed line "
            "is what the picture of the other role scores, about what an unrelated picture gives."
        )
        figures.append(Picture.of("scores.png", "Scores", caption, means_figure(report, list(report.measures))))
    if any(row.nearest for row in report.pictures):
        caption = "Which thing of the gallery each picture is nearest to."
        figures.append(Picture.of("gallery.png", "Which thing it is", caption, gallery_figure(report)))
    return figures
