"""safetensors in and out, with what the library leaves open: a fixed byte order of the header, and errors that name
the key.

The layout (https://github.com/huggingface/safetensors): eight bytes of header length, little endian; the header as
JSON; the tensors' bytes. The library's own writer orders the metadata at random, so equal adapters would not be equal
files.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._atomic import atomic_write

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_MAX_HEADER = 64 * 1024 * 1024
_MAX_ELEMENTS = 2**32
_MAX_SIDE = 2**24


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `tensors` and string `metadata` atomically; equal content gives equal bytes.

    Raises:
        QrloraError: the file cannot be written, or a tensor is of a type safetensors files of ours do not hold.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for key in sorted(tensors):
        tensor = tensors[key]
        if tensor.dtype not in _DTYPES:
            raise QrloraError(f"{key} has dtype {tensor.dtype}, which cannot be stored; convert it to float32 first.")
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def chunks() -> Iterator[bytes]:
        yield struct.pack("<Q", len(encoded)) + encoded
        for key in sorted(tensors):
            yield _bytes_of(tensors[key])

    return atomic_write(path, chunks())


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole safetensors file onto the CPU, and its metadata.

    The header is checked against the size of the file before anything is allocated, so a truncated file, or one that
    promises absurd shapes, is refused by the key it fails at.

    Raises:
        QrloraError: no such file, not a safetensors file, truncated, absurd sizes.
    """
    source = Path(path)
    metadata = read_metadata(source)
    try:
        with cast(Any, safe_open)(source, framework="pt", device="cpu") as file:
            return {str(key): cast(Tensor, file.get_tensor(key)) for key in cast(list[str], file.keys())}, metadata
    except (SafetensorError, OSError) as error:
        raise QrloraError(f"{source} is not a readable safetensors file: {error}.") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata alone, after the same checks of the header as `read_safetensors`."""
    return _checked_header(Path(path))


def _checked_header(source: Path) -> dict[str, str]:
    if not source.is_file():
        raise QrloraError(f"{source} does not exist or is not a file.")
    try:
        size = source.stat().st_size
        with source.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise QrloraError(f"{source} is not a safetensors file, or is truncated within its header.")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise QrloraError(f"{source} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise QrloraError(f"{source} is not a safetensors file: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise QrloraError(f"{source} is not a safetensors file: its header is not a JSON object.")
    entries = cast(dict[str, Any], header)
    metadata: Any = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise QrloraError(f"{source} is not a safetensors file: its metadata is not a JSON object.")
    for key, entry in entries.items():
        _check_entry(source, key, entry, size - 8 - length)
    return {str(key): str(value) for key, value in cast(dict[str, Any], metadata).items()}


def _check_entry(source: Path, key: str, entry: Any, available: int) -> None:
    try:
        shape: list[int] = [int(side) for side in entry["shape"]]
        begin, end = (int(offset) for offset in entry["data_offsets"])
        dtype = str(entry["dtype"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise QrloraError(f"{source}: the header's entry for {key} is malformed.") from error
    if dtype not in _SIZES:
        raise QrloraError(f"{source}: {key} has dtype {dtype}, which is not one of {', '.join(_SIZES)}.")
    if any(not 0 <= side <= _MAX_SIDE for side in shape) or math.prod(shape) > _MAX_ELEMENTS:
        raise QrloraError(f"{source}: {key} claims the absurd shape {shape}; the file is damaged or not an adapter.")
    if end > available:
        raise QrloraError(f"{source} is truncated: {key} ends {end - available} bytes past the end of the file.")
    if end - begin != math.prod(shape) * _SIZES[dtype]:
        raise QrloraError(
            f"{source}: {key} holds {end - begin} bytes, which does not fit its shape {shape} in {dtype}."
        )
