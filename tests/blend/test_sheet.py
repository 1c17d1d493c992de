"""Sheets: geometry, not taste."""

from PIL import Image, ImageChops

from qrlora.blend import Cell, Grid, draw_sheet
from qrlora.blend.sheet import cell_size

RED, BLUE = (200, 30, 30), (30, 30, 200)


def _solid(colour: tuple[int, int, int], size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def _bounds(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    return ImageChops.invert(
        ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour)).convert("L").point(lambda v: 255 * (v > 0))
    ).getbbox()


def _grid(rows: int, columns: int, marked: tuple[int, int]) -> Grid:
    pictures = [[_solid(RED if (i, j) == marked else BLUE) for j in range(columns)] for i in range(rows)]
    labels = [f"{0.25 * k:g}" for k in range(max(rows, columns))]
    return Grid(pictures, labels[:rows], labels[:columns], "content weight", "style weight", "merge")


def test_rows_go_down_and_columns_across() -> None:
    boxes = {at: _bounds(draw_sheet("t", "s", [], [_grid(3, 4, at)]), RED) for at in ((0, 0), (2, 0), (0, 3))}
    first, below, right = boxes[0, 0], boxes[2, 0], boxes[0, 3]
    assert first is not None
    assert below is not None
    assert right is not None
    assert below[0] == first[0]
    assert below[1] > first[3]
    assert right[1] == first[1]
    assert right[0] > first[2]


def test_small_pictures_are_enlarged_by_whole_numbers_and_large_ones_shrunk() -> None:
    assert cell_size(64, 64) == (192, 192)
    assert cell_size(128, 128) == (256, 256)
    assert cell_size(200, 100) == (200, 100)
    assert cell_size(1024, 512) == (256, 128)


def test_long_texts_and_empty_cells_fit() -> None:
    cells = [[Cell(None, "h" * 400, "words " * 100), Cell(_solid(RED), "", "")]]
    sheet = draw_sheet("a very long prompt " * 40, "", cells, [_grid(1, 1, (0, 0))])
    assert sheet.width < 1200
    margin = sheet.crop((0, 0, 30, sheet.height)).getextrema()
    assert margin == ((255, 255),) * 3
    assert sheet.crop((sheet.width - 30, 0, *sheet.size)).getextrema() == ((255, 255),) * 3
