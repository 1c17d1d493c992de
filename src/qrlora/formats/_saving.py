"""Tensors and names of files on their way out."""

from pathlib import Path

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._adapter import SaveDtype, check_finite

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def checked_path(path: str | Path) -> Path:
    """The path, which must be one of a safetensors file."""
    target = Path(path)
    if target.suffix != ".safetensors":
        raise QrloraError(f"{target}: an adapter file's name ends in .safetensors.")
    return target


def cast_to_save(name: str, tensor: Tensor, save_dtype: SaveDtype) -> Tensor:
    """A copy on the CPU as it is stored; refused, by its name, where it is not finite."""
    if save_dtype not in _DTYPES:
        raise QrloraError(f"save_dtype {save_dtype!r} is not known; use one of {', '.join(_DTYPES)}.")
    stored = tensor.detach().to("cpu", _DTYPES[save_dtype])
    check_finite(name, stored)
    return stored
