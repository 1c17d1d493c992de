"""Tensors of a checked file, read one at a time when they are asked for."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._later import Later
from qrlora.formats._safetensors import TORCH_DTYPES, Contents, identity_of, shown


def tensors_later(path: str | Path, contents: Contents, keys: Iterable[str]) -> dict[str, Later]:
    """Some tensors of a file whose header `read_contents` has checked, each read from it whenever it is asked for.

    Asking raises QrloraError where the file is no longer the one that was checked.
    """
    source = Path(path)
    found: dict[str, Later] = {}
    for key in keys:
        entry = contents.entries[key]
        found[key] = Later(TORCH_DTYPES[entry.dtype], entry.shape, partial(_read_one, source, contents, key))
    return found


def _read_one(source: Path, contents: Contents, key: str) -> Tensor:
    entry = contents.entries[key]
    tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    left = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
    try:
        with source.open("rb", buffering=0) as stream:
            if identity_of(stream.fileno()) != contents.identity:
                raise QrloraError(f"{source} has changed since it was opened; read it again.")
            stream.seek(contents.start + entry.begin)
            while left:
                count = stream.readinto(left)
                if not count:
                    raise QrloraError(f"{source} is truncated: {shown(key)} ends past the end of the file.")
                left = left[count:]
    except OSError as error:
        raise QrloraError(f"{source} cannot be read: {error.strerror or error}.") from error
    return tensor
