"""Reports that people look at: one HTML page that needs nothing but itself, and the looks its figures share."""

from qrlora.pages._figures import BAND, FAINT, FIRST, INK, SECOND, WIDTH, Picture, plain_axes, png
from qrlora.pages._page import document, figure, table

__all__ = [
    "BAND",
    "FAINT",
    "FIRST",
    "INK",
    "SECOND",
    "WIDTH",
    "Picture",
    "document",
    "figure",
    "plain_axes",
    "png",
    "table",
]
