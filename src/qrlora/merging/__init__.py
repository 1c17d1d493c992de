"""Merging: adapters into one adapter. One typed function a method, in `methods/`."""

from qrlora.merging import methods as _methods  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers them)
from qrlora.merging._checks import check_compatible
from qrlora.merging._merge import merge
from qrlora.merging._norms import NORM_RATIO_LIMIT, NormWarning, norm_ratio, update_norm
from qrlora.merging._parts import WHOLE, restricted
from qrlora.merging._refactor import refactor
from qrlora.merging._registry import merge_names, register_merge

__all__ = [
    "NORM_RATIO_LIMIT",
    "WHOLE",
    "NormWarning",
    "check_compatible",
    "merge",
    "merge_names",
    "norm_ratio",
    "refactor",
    "register_merge",
    "restricted",
    "update_norm",
]
