"""What differs between model families, and how a pipeline is loaded.

A family is one file here (`flux.py`): which layers are adapted, how pictures and prompts are encoded, how the denoiser
is called and how pictures are made. Everything above works on `Family` alone.
"""

from importlib import import_module
from pkgutil import iter_modules

from qrlora.models import _encoders as _encoders  # registers what of them is adapted
from qrlora.models._blueprint import Blueprint, read_blueprint, shipped_models
from qrlora.models._common import forget_tensors
from qrlora.models._family import Family, GenerationDefaults
from qrlora.models._loaded import LoadedModel, Offload
from qrlora.models._loading import ModelSettings, load_pipeline, read_settings
from qrlora.models._noise import Diffusion, FlowMatching, NoiseProcess
from qrlora.models._quantization import Quantization, check_quantization, quantized_layers
from qrlora.models._reading import told
from qrlora.models._registry import family_names, family_of, register_family
from qrlora.models._streaming import BlockStream, repeated_blocks

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")  # registers its family

__all__ = [
    "BlockStream",
    "Blueprint",
    "Diffusion",
    "Family",
    "FlowMatching",
    "GenerationDefaults",
    "LoadedModel",
    "ModelSettings",
    "NoiseProcess",
    "Offload",
    "Quantization",
    "check_quantization",
    "family_names",
    "family_of",
    "forget_tensors",
    "load_pipeline",
    "quantized_layers",
    "read_blueprint",
    "read_settings",
    "register_family",
    "repeated_blocks",
    "shipped_models",
    "told",
]
