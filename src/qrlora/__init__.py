"""Adapters for text-to-image diffusion models that are made to be merged.

`W' = W + Q dR`: the basis `Q` is derived from the weight and frozen, the coefficients `dR` are trained. The public
names are loaded on first use, so that importing the package (and the command line's help) stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from qrlora.adapter import (
        AdapterSpec,
        BasisCache,
        adapter_of,
        adapters_disabled,
        add_adapter,
        attach_adapter,
        attach_to_pipeline,
        remove_adapter,
        save_adapter,
        set_adapters,
        set_pipeline_adapters,
        trainable_parameters,
    )
    from qrlora.formats import Adapter
    from qrlora.merging import merge
    from qrlora.models import load_pipeline
    from qrlora.training import TrainConfig, train

from qrlora.errors import QrloraError, QrloraWarning

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "qrlora.formats",
    "AdapterSpec": "qrlora.adapter",
    "BasisCache": "qrlora.adapter",
    "TrainConfig": "qrlora.training",
    "adapter_of": "qrlora.adapter",
    "adapters_disabled": "qrlora.adapter",
    "add_adapter": "qrlora.adapter",
    "attach_adapter": "qrlora.adapter",
    "attach_to_pipeline": "qrlora.adapter",
    "load_pipeline": "qrlora.models",
    "merge": "qrlora.merging",
    "remove_adapter": "qrlora.adapter",
    "save_adapter": "qrlora.adapter",
    "set_adapters": "qrlora.adapter",
    "set_pipeline_adapters": "qrlora.adapter",
    "train": "qrlora.training",
    "trainable_parameters": "qrlora.adapter",
}

__all__ = [
    "Adapter",
    "AdapterSpec",
    "BasisCache",
    "QrloraError",
    "QrloraWarning",
    "TrainConfig",
    "__version__",
    "adapter_of",
    "adapters_disabled",
    "add_adapter",
    "attach_adapter",
    "attach_to_pipeline",
    "load_adapter",
    "load_pipeline",
    "merge",
    "remove_adapter",
    "save_adapter",
    "set_adapters",
    "set_pipeline_adapters",
    "train",
    "trainable_parameters",
]


def load_adapter(path: "str | Path", *, lazy: bool = False) -> "Adapter":
    """Read an adapter file or a peft folder; see `qrlora.formats.read_adapter`.

    With `lazy`, layers are read from the file whenever they are asked for, so `merge([...]).save(path)` of such
    adapters holds one layer at a time.
    """
    from qrlora.formats import read_adapter

    return read_adapter(path, lazy=lazy)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qrlora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
