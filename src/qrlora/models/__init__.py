"""What differs between model families, and how a pipeline is loaded.

A family is one file here (`flux.py`): which layers are adapted, how pictures and prompts are encoded, how the denoiser
is called and how pictures are made. Everything above works on `Family` alone.
"""

from qrlora.models import flux as _flux  # noqa: F401  (registers the family)
from qrlora.models._family import Family, GenerationDefaults, family_names, family_of, register_family
from qrlora.models._loading import LoadedModel, ModelSettings, load_pipeline, read_settings

__all__ = [
    "Family",
    "GenerationDefaults",
    "LoadedModel",
    "ModelSettings",
    "family_names",
    "family_of",
    "load_pipeline",
    "read_settings",
    "register_family",
]
