"""Adapter files in and out: the native file, the peft folder, the coefficients-only file."""

from qrlora.formats._adapter import Adapter, Component, Header, LowRank, SaveDtype, same_weight
from qrlora.formats._atomic import atomic_write
from qrlora.formats._coefficients import (
    Coefficients,
    CoefficientsFile,
    basis_vectors,
    is_coefficients,
    read_coefficients,
    write_coefficients,
)
from qrlora.formats._native import read_native, write_native
from qrlora.formats._peft_folder import read_peft_folder, write_peft_folder
from qrlora.formats._read import read_adapter
from qrlora.formats._safetensors import read_metadata, read_safetensors, write_safetensors

__all__ = [
    "Adapter",
    "Coefficients",
    "CoefficientsFile",
    "Component",
    "Header",
    "LowRank",
    "SaveDtype",
    "atomic_write",
    "basis_vectors",
    "is_coefficients",
    "read_adapter",
    "read_coefficients",
    "read_metadata",
    "read_native",
    "read_peft_folder",
    "read_safetensors",
    "same_weight",
    "write_coefficients",
    "write_native",
    "write_peft_folder",
    "write_safetensors",
]
