"""A basis on a denoiser, through plain peft: new adapters, adapters from files, and adapters as files."""

from qrlora.adapter._add import add_adapter
from qrlora.adapter._attach import attach_adapter, check_fits, resolve_coefficients
from qrlora.adapter._cache import BasisCache, default_cache_folder
from qrlora.adapter._control import adapters_disabled, remove_adapter, set_adapters, trainable_parameters
from qrlora.adapter._export import adapter_of, base_hash, save_adapter
from qrlora.adapter._spec import AdapterSpec
from qrlora.adapter.targets import register_targets, target_layers

__all__ = [
    "AdapterSpec",
    "BasisCache",
    "adapter_of",
    "adapters_disabled",
    "add_adapter",
    "attach_adapter",
    "base_hash",
    "check_fits",
    "default_cache_folder",
    "register_targets",
    "remove_adapter",
    "resolve_coefficients",
    "save_adapter",
    "set_adapters",
    "target_layers",
    "trainable_parameters",
]
