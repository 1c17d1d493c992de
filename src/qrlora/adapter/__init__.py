"""A basis on a denoiser, through plain peft: new adapters, adapters from files, and adapters as files."""

from qrlora.adapter._add import add_adapter
from qrlora.adapter._attach import attach_adapter, check_fits, ranks_of, resolve_coefficients, trained_size
from qrlora.adapter._cache import BasisCache, default_cache_folder
from qrlora.adapter._control import adapters_disabled, remove_adapter, set_adapters, trainable_parameters
from qrlora.adapter._estimate import basis_notice, estimate_seconds
from qrlora.adapter._export import adapter_of, base_hash, kept_tensors, restore_kept, save_adapter
from qrlora.adapter._spec import AdapterSpec
from qrlora.adapter._usage import GateUsage, is_gated, record_usage
from qrlora.adapter._weights import dense_weight
from qrlora.adapter.forms._form import check_spec
from qrlora.adapter.targets import adaptable_layers, register_targets, target_layers

__all__ = [
    "AdapterSpec",
    "BasisCache",
    "GateUsage",
    "adaptable_layers",
    "adapter_of",
    "adapters_disabled",
    "add_adapter",
    "attach_adapter",
    "base_hash",
    "basis_notice",
    "check_fits",
    "check_spec",
    "default_cache_folder",
    "dense_weight",
    "estimate_seconds",
    "is_gated",
    "kept_tensors",
    "ranks_of",
    "record_usage",
    "register_targets",
    "remove_adapter",
    "resolve_coefficients",
    "restore_kept",
    "save_adapter",
    "set_adapters",
    "target_layers",
    "trainable_parameters",
    "trained_size",
]
