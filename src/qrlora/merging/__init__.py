"""Merging: adapters into one adapter, or used together by a rule while drawing. One typed function a method, in
`methods/`."""

from qrlora.merging import methods as _methods  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers them)
from qrlora.merging._checks import check_compatible
from qrlora.merging._merge import merge
from qrlora.merging._norms import NORM_RATIO_LIMIT, NormWarning, norm_ratio, update_norm
from qrlora.merging._parts import WHOLE, restricted
from qrlora.merging._refactor import refactor
from qrlora.merging._registry import merge_names, merge_options, register_merge, register_run_time, run_time_names
from qrlora.merging._run_time import RunTimeRule, adapters_by_rule, check_run_time, run_time_rule
from qrlora.merging._to_file import merge_to_file
from qrlora.merging.methods.k_lora import KLora, k_lora

__all__ = [
    "NORM_RATIO_LIMIT",
    "WHOLE",
    "KLora",
    "NormWarning",
    "RunTimeRule",
    "adapters_by_rule",
    "check_compatible",
    "check_run_time",
    "k_lora",
    "merge",
    "merge_names",
    "merge_options",
    "merge_to_file",
    "norm_ratio",
    "refactor",
    "register_merge",
    "register_run_time",
    "restricted",
    "run_time_names",
    "run_time_rule",
    "update_norm",
]
