"""The whole job: two adapters, their merge, and pictures over a grid of their weights on one sheet.

Loaded on first use, so that a command's help does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qrlora.blend.config import BlendConfig

if TYPE_CHECKING:
    from qrlora.blend.batches import Wish, paint_wishes, picture_names, read_wishes
    from qrlora.blend.job import BlendResult, blend
    from qrlora.blend.painter import Painter, Picture, choose_place, load_painter, settings_of
    from qrlora.blend.provenance import AdapterUse, Provenance, RunTime, read_provenance
    from qrlora.blend.samples import Read, read_samples, reference_samples, truth_samples
    from qrlora.blend.sheet import Cell, Grid, draw_sheet
    from qrlora.blend.trial import Trial, draw_trial, drift_prompts
    from qrlora.blend.usage import DrawnUsage, draw_usage, trained_captions

_HOMES = {
    "AdapterUse": "provenance",
    "Wish": "batches",
    "BlendResult": "job",
    "Cell": "sheet",
    "DrawnUsage": "usage",
    "Grid": "sheet",
    "Painter": "painter",
    "Picture": "painter",
    "Provenance": "provenance",
    "Read": "samples",
    "RunTime": "provenance",
    "Trial": "trial",
    "blend": "job",
    "choose_place": "painter",
    "draw_sheet": "sheet",
    "draw_trial": "trial",
    "draw_usage": "usage",
    "drift_prompts": "trial",
    "load_painter": "painter",
    "paint_wishes": "batches",
    "picture_names": "batches",
    "read_provenance": "provenance",
    "read_wishes": "batches",
    "read_samples": "samples",
    "reference_samples": "samples",
    "settings_of": "painter",
    "trained_captions": "usage",
    "truth_samples": "samples",
}

__all__ = [
    "AdapterUse",
    "BlendConfig",
    "BlendResult",
    "Cell",
    "DrawnUsage",
    "Grid",
    "Painter",
    "Picture",
    "Provenance",
    "Read",
    "RunTime",
    "Trial",
    "Wish",
    "blend",
    "choose_place",
    "draw_sheet",
    "draw_trial",
    "draw_usage",
    "drift_prompts",
    "load_painter",
    "paint_wishes",
    "picture_names",
    "read_provenance",
    "read_samples",
    "read_wishes",
    "reference_samples",
    "settings_of",
    "trained_captions",
    "truth_samples",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qrlora.blend' has no attribute {name!r}")
    return getattr(import_module(f"qrlora.blend.{_HOMES[name]}"), name)
