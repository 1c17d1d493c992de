"""Sheets: labelled grids of pictures, drawn with Pillow and the font that it carries."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_PAPER = "#ffffff"
_INK = "#1f2328"
_QUIET = "#6e7781"
_LINE = "#d0d7de"
_EMPTY = "#f6f8fa"
_CELL_LEAST, _CELL_MOST = 160, 256
_GAP = 10
_MARGIN = 36
_TITLE, _HEADING, _LABEL, _SMALL = 24, 17, 15, 13


@dataclass(frozen=True)
class Cell:
    """One picture with a heading above and a quiet caption below; without a picture, an empty frame."""

    picture: Image.Image | None
    heading: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Grid:
    """Pictures over two axes.

    Args:
        pictures: rows from top to bottom, each from left to right.
        row_labels, column_labels: one a row and one a column.
        row_title, column_title: names of the axes; an arrow follows them.
        heading: above the whole grid.
    """

    pictures: Sequence[Sequence[Image.Image]]
    row_labels: Sequence[str]
    column_labels: Sequence[str]
    row_title: str
    column_title: str
    heading: str = ""


def span(bounds: tuple[float, float]) -> str:
    """A range of timesteps as it is typed after an adapter's weight: `500-1000`."""
    return f"{bounds[0]:.10g}-{bounds[1]:.10g}"


def cell_size(width: int, height: int) -> tuple[int, int]:
    """Size at which pictures are shown: whole multiples for small ones, 256 at most for large ones."""
    longest = max(width, height)
    scale = -(-_CELL_LEAST // longest) if longest < _CELL_LEAST else min(1.0, _CELL_MOST / longest)
    return round(width * scale), round(height * scale)


def draw_sheet(title: str, subtitle: str, cells: Sequence[Sequence[Cell]], grids: Sequence[Grid]) -> Image.Image:
    """One labelled picture: a block of captioned cells at the left, then grids side by side.

    Args:
        title: first line, usually the prompt.
        subtitle: quiet second line: model, method, seed.
        cells: rows of captioned cells; may be empty where there are grids.
        grids: drawn left to right.

    Returns:
        RGB picture on white.
    """
    shown = [cell.picture for row in cells for cell in row if cell.picture is not None]
    # Of cells alone the squarest, so that one panorama does not flatten all.
    first = grids[0].pictures[0][0] if grids else max(shown, key=lambda each: min(each.size) / max(each.size))
    size = cell_size(*first.size)
    blocks = [_draw_cells(cells, size)] if cells else []
    blocks += [_draw_grid(grid, size) for grid in grids]
    gutter = 3 * _GAP
    width = max(sum(block.width for block in blocks) + gutter * (len(blocks) - 1), 480)
    title_lines = _wrap(title, _font(_TITLE), width, 2)
    subtitle_lines = _wrap(subtitle, _font(_SMALL), width, 2)
    head = len(title_lines) * (_TITLE + 8) + len(subtitle_lines) * (_SMALL + 6) + 18
    height = head + max(block.height for block in blocks)
    sheet = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _MARGIN
    for line in title_lines:
        draw.text((_MARGIN, y), line, fill=_INK, font=_font(_TITLE))
        y += _TITLE + 8
    for line in subtitle_lines:
        draw.text((_MARGIN, y), line, fill=_QUIET, font=_font(_SMALL))
        y += _SMALL + 6
    x = _MARGIN
    for block in blocks:
        sheet.paste(block, (x, _MARGIN + head))
        x += block.width + gutter
    return sheet


def _draw_cells(cells: Sequence[Sequence[Cell]], size: tuple[int, int]) -> Image.Image:
    width, height = size
    heading, caption = _HEADING + 10, 2 * (_SMALL + 4) + 10
    columns = max(len(row) for row in cells)
    block = Image.new("RGB", (columns * (width + _GAP) - _GAP, len(cells) * (heading + height + caption)), _PAPER)
    draw = ImageDraw.Draw(block)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            x, y = j * (width + _GAP), i * (heading + height + caption)
            draw.text((x, y), _shorten(cell.heading, _font(_HEADING), width), fill=_INK, font=_font(_HEADING))
            _place(block, cell.picture, (x, y + heading), size)
            for k, line in enumerate(_wrap(cell.caption, _font(_SMALL), width, 2)):
                draw.text((x, y + heading + height + 5 + k * (_SMALL + 4)), line, fill=_QUIET, font=_font(_SMALL))
    return block


def _draw_grid(grid: Grid, size: tuple[int, int]) -> Image.Image:
    width, height = size
    rows, columns = len(grid.pictures), len(grid.pictures[0])
    label = max(round(_font(_LABEL).getlength(text)) for text in grid.row_labels) + 10
    side = _LABEL + 14  # the rotated title of the rows
    left = side + label
    top = _HEADING + 10 if grid.heading else 0
    head = top + 2 * (_LABEL + 8)
    body_width, body_height = columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP
    block = Image.new("RGB", (left + body_width, head + body_height), _PAPER)
    draw = ImageDraw.Draw(block)
    if grid.heading:
        draw.text((left, 0), _shorten(grid.heading, _font(_HEADING), body_width), fill=_INK, font=_font(_HEADING))
    block.paste(_axis(grid.column_title, body_width), (left, top))
    # rows grow downwards, so the title is read downwards and its arrow points the same way
    block.paste(_axis(grid.row_title, body_height).rotate(-90, expand=True), (0, head))
    for j, text in enumerate(grid.column_labels):
        draw.text((left + j * (width + _GAP) + width / 2, head - 7), text, fill=_QUIET, font=_font(_LABEL), anchor="ms")
    for i, text in enumerate(grid.row_labels):
        y = head + i * (height + _GAP)
        draw.text((left - 8, y + height / 2), text, fill=_QUIET, font=_font(_LABEL), anchor="rm")
        for j, picture in enumerate(grid.pictures[i]):
            _place(block, picture, (left + j * (width + _GAP), y), size)
    return block


def _axis(title: str, length: int) -> Image.Image:
    """The title of an axis and a thin arrow to its end, as a strip `length` wide."""
    strip = Image.new("RGB", (length, _LABEL + 6), _PAPER)
    draw = ImageDraw.Draw(strip)
    text = _shorten(title, _font(_LABEL), length - 24)
    draw.text((0, 0), text, fill=_INK, font=_font(_LABEL))
    start, end, y = round(_font(_LABEL).getlength(text)) + 10, length - 2, _LABEL // 2 + 3
    if end - start > 12:
        draw.line((start, y, end, y), fill=_QUIET)
        draw.line((end - 5, y - 4, end, y, end - 5, y + 4), fill=_QUIET)
    return strip


def _place(block: Image.Image, picture: Image.Image | None, at: tuple[int, int], size: tuple[int, int]) -> None:
    frame = Image.new("RGB", size, _EMPTY if picture is None else _PAPER)
    if picture is not None:
        scale = min(size[0] / picture.width, size[1] / picture.height)
        shown = picture.convert("RGB").resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BICUBIC
        )
        frame.paste(shown, ((size[0] - shown.width) // 2, (size[1] - shown.height) // 2))
    ImageDraw.Draw(frame).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=_LINE)
    block.paste(frame, at)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """`text` in at most `most` lines of `width` pixels; the last one is shortened."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < most - 1:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line = f"{line} {words.pop(0)}"
        lines.append(_shorten(line, font, width))
    return [*lines, _shorten(" ".join(words), font, width)] if words else lines
