"""The whole job: two adapters, their merge, and pictures over a grid of their weights on one sheet.

Loaded on first use, so that a command's help does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qrlora.blend.config import BlendConfig

if TYPE_CHECKING:
    from qrlora.blend.job import BlendResult, blend
    from qrlora.blend.painter import Painter, Picture, choose_place, settings_of
    from qrlora.blend.provenance import AdapterUse, Provenance, read_provenance
    from qrlora.blend.sheet import Cell, Grid, draw_sheet

_HOMES = {
    "AdapterUse": "provenance",
    "BlendResult": "job",
    "Cell": "sheet",
    "Grid": "sheet",
    "Painter": "painter",
    "Picture": "painter",
    "Provenance": "provenance",
    "blend": "job",
    "choose_place": "painter",
    "draw_sheet": "sheet",
    "read_provenance": "provenance",
    "settings_of": "painter",
}

__all__ = [
    "AdapterUse",
    "BlendConfig",
    "BlendResult",
    "Cell",
    "Grid",
    "Painter",
    "Picture",
    "Provenance",
    "blend",
    "choose_place",
    "draw_sheet",
    "read_provenance",
    "settings_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qrlora.blend' has no attribute {name!r}")
    return getattr(import_module(f"qrlora.blend.{_HOMES[name]}"), name)
