"""Merging: adapters into one adapter. One typed function a method, in `methods/`."""

from qrlora.merging import methods as _methods  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers them)
from qrlora.merging._checks import check_compatible
from qrlora.merging._merge import merge
from qrlora.merging._registry import merge_names, register_merge

__all__ = ["check_compatible", "merge", "merge_names", "register_merge"]
