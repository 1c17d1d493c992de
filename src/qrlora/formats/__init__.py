"""Adapter files in and out: our native file, which is diffusers', and those of peft, kohya, ComfyUI and others."""

from qrlora.formats._adapter import (
    DENOISERS,
    TEXT_ENCODERS,
    Adapter,
    Component,
    Header,
    LowRank,
    SaveDtype,
    check_weight,
    same_weight,
)
from qrlora.formats._atomic import atomic_write
from qrlora.formats._base import weight_source
from qrlora.formats._coefficients import (
    Coefficients,
    CoefficientsFile,
    basis_vectors,
    is_coefficients,
    read_coefficients,
    write_coefficients,
)
from qrlora.formats._encoders import STEM as CLIP_STEM
from qrlora.formats._import import Imported, Recognised, import_adapter, open_adapter, recognise
from qrlora.formats._layers import LayersOnDemand, all_layers, each_layer, shapes_of, some_layers
from qrlora.formats._layout import WeightSource, format_names, register_layout
from qrlora.formats._native import read_native, write_native
from qrlora.formats._peft_folder import read_peft_folder, write_peft_folder
from qrlora.formats._read import read_adapter
from qrlora.formats._safetensors import read_metadata, read_safetensors, shown
from qrlora.formats._write import write_adapter
from qrlora.formats._write_safetensors import write_safetensors
from qrlora.formats.layouts import load_layouts

load_layouts()

__all__ = [
    "CLIP_STEM",
    "DENOISERS",
    "TEXT_ENCODERS",
    "Adapter",
    "Coefficients",
    "CoefficientsFile",
    "Component",
    "Header",
    "Imported",
    "LayersOnDemand",
    "LowRank",
    "Recognised",
    "SaveDtype",
    "WeightSource",
    "all_layers",
    "atomic_write",
    "basis_vectors",
    "check_weight",
    "each_layer",
    "format_names",
    "import_adapter",
    "is_coefficients",
    "open_adapter",
    "read_adapter",
    "read_coefficients",
    "read_metadata",
    "read_native",
    "read_peft_folder",
    "read_safetensors",
    "recognise",
    "register_layout",
    "same_weight",
    "shapes_of",
    "shown",
    "some_layers",
    "weight_source",
    "write_adapter",
    "write_coefficients",
    "write_native",
    "write_peft_folder",
    "write_safetensors",
]
