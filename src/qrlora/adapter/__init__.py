"""A basis on a denoiser, through plain peft: new adapters, adapters from files, and adapters as files."""

from qrlora.adapter._add import add_adapter, check_addable, check_encoder_spec, compute_bases
from qrlora.adapter._attach import attach_adapter, check_fits, ranks_of, resolve_coefficients, trained_size
from qrlora.adapter._bank import AdapterBank
from qrlora.adapter._blank import add_blank_adapter
from qrlora.adapter._cache import BasisCache, default_cache_folder
from qrlora.adapter._choice import Choice, adapters_by_choice
from qrlora.adapter._control import adapters_disabled, remove_adapter, set_adapters, trainable_parameters
from qrlora.adapter._estimate import basis_notice, estimate_seconds
from qrlora.adapter._export import adapter_of, base_hash, kept_tensors, restore_kept, save_adapter
from qrlora.adapter._parallel import by_layer
from qrlora.adapter._peft import zero_masked
from qrlora.adapter._pipeline import (
    adapter_of_pipeline,
    adapters_set_aside,
    attach_to_pipeline,
    check_fits_pipeline,
    denoisers_with,
    pipeline_adapter_names,
    pipeline_adapters_disabled,
    remove_from_pipeline,
    set_pipeline_adapters,
    text_encoders_with,
)
from qrlora.adapter._spec import AdapterSpec
from qrlora.adapter._timesteps import ALL_TIMESTEPS, TimestepRange, adapters_by_timestep, check_timesteps
from qrlora.adapter._usage import GateUsage, is_gated, record_usage
from qrlora.adapter._weights import dense_weight
from qrlora.adapter.blocks import Blocks, block_names, layers_in, register_blocks
from qrlora.adapter.forms._form import check_spec
from qrlora.adapter.targets import adaptable_layers, register_targets, target_layers

__all__ = [
    "ALL_TIMESTEPS",
    "AdapterBank",
    "AdapterSpec",
    "BasisCache",
    "Blocks",
    "Choice",
    "GateUsage",
    "TimestepRange",
    "adaptable_layers",
    "adapter_of",
    "adapter_of_pipeline",
    "adapters_by_choice",
    "adapters_by_timestep",
    "adapters_disabled",
    "adapters_set_aside",
    "add_adapter",
    "add_blank_adapter",
    "attach_adapter",
    "attach_to_pipeline",
    "base_hash",
    "basis_notice",
    "block_names",
    "by_layer",
    "check_addable",
    "check_encoder_spec",
    "check_fits",
    "check_fits_pipeline",
    "check_spec",
    "check_timesteps",
    "compute_bases",
    "default_cache_folder",
    "denoisers_with",
    "dense_weight",
    "estimate_seconds",
    "is_gated",
    "kept_tensors",
    "layers_in",
    "pipeline_adapter_names",
    "pipeline_adapters_disabled",
    "ranks_of",
    "record_usage",
    "register_blocks",
    "register_targets",
    "remove_adapter",
    "remove_from_pipeline",
    "resolve_coefficients",
    "restore_kept",
    "save_adapter",
    "set_adapters",
    "set_pipeline_adapters",
    "target_layers",
    "text_encoders_with",
    "trainable_parameters",
    "trained_size",
    "zero_masked",
]
