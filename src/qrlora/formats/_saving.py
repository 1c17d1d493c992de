"""Tensors and names of files on their way out."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._adapter import LowRank, SaveDtype, check_finite
from qrlora.formats._later import Later
from qrlora.formats._layers import shapes_of

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def checked_path(path: str | Path) -> Path:
    """The path, which must be one of a safetensors file."""
    target = Path(path)
    if target.suffix != ".safetensors":
        raise QrloraError(f"{target}: an adapter file's name ends in .safetensors.")
    return target


def cast_to_save(name: str, tensor: Tensor, save_dtype: SaveDtype) -> Tensor:
    """A copy on the CPU as it is stored; refused, by its name, where it is not finite."""
    stored = tensor.detach().to("cpu", stored_dtype(save_dtype))
    check_finite(name, stored)
    return stored


def stored_dtype(save_dtype: SaveDtype) -> torch.dtype:
    """What a file's tensors are of.

    Raises:
        QrloraError: it is not known.
    """
    if save_dtype not in _DTYPES:
        raise QrloraError(f"save_dtype {save_dtype!r} is not known; use one of {', '.join(_DTYPES)}.")
    return _DTYPES[save_dtype]


def stored_pairs(
    layers: Mapping[str, LowRank], keys: Callable[[str], tuple[str, str]], save_dtype: SaveDtype
) -> dict[str, Later]:
    """The factors of all layers as they are stored, each cast and checked as it is written.

    The keys of a layer follow each other in a file, so every layer is asked for once and one is held at a time.

    Args:
        layers: the pairs.
        keys: the keys of a layer's A and B.
        save_dtype: "fp32" or "bf16".
    """
    dtype, latest = stored_dtype(save_dtype), dict[str, LowRank]()

    def factor(name: str, which: str) -> Tensor:
        if name not in latest:
            latest.clear()
            latest[name] = layers[name]
        return cast_to_save(name, latest[name].A if which == "A" else latest[name].B, save_dtype)

    found: dict[str, Later] = {}
    for name, pair in shapes_of(layers).items():
        for which, key in zip("AB", keys(name), strict=True):
            shape = tuple((pair.A if which == "A" else pair.B).shape)
            found[key] = Later(dtype, shape, partial(factor, name, which))
    return found
