"""safetensors in, with errors that name the key.

The layout (https://github.com/huggingface/safetensors): eight bytes of header length, little endian; the header as
JSON; the tensors' bytes.
"""

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qrlora.errors import QrloraError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_MAX_HEADER = 16 * 1024 * 1024
_MAX_ELEMENTS = 2**32
_MAX_SIDE = 2**24
_MAX_SIDES = 8
_MAX_KEY = 512
_MAX_TENSORS = 50_000
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_PICKLE = "a pickle, which can run code when it is opened; convert it to .safetensors with the tool that made it"
# First bytes of what people take for a safetensors file.
_SIGNATURES = {
    b"PK\x03\x04": _PICKLE,
    **{bytes([0x80, protocol]): _PICKLE for protocol in range(2, 6)},
    b"GGUF": "a GGUF file, not an adapter; give the adapter's .safetensors file",
    b"version ": "a Git LFS pointer, not the file itself; download the file it stands for",
    b"<!DOCTYP": "a web page, not an adapter; download the file again",
    b"<html": "a web page, not an adapter; download the file again",
}


@dataclass(frozen=True)
class TensorEntry:
    """What a checked header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Of its bytes, after the header."""


@dataclass(frozen=True)
class Contents:
    """A checked header: what a file holds, before anything of it is loaded."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    start: int
    """Of the tensors' bytes in the file."""
    identity: tuple[int, ...]
    """Of the file that was checked, so that another one in its place is not read by its header."""


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole safetensors file onto the CPU, and its metadata.

    The header is checked against the size of the file before anything is allocated, so a truncated file, or one that
    promises absurd shapes, is refused by the key it fails at.

    Raises:
        QrloraError: no such file, not a safetensors file, truncated, absurd sizes.
    """
    contents = read_contents(path)
    return read_tensors(path, contents.entries), dict(contents.metadata)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata alone, after the same checks of the header as `read_safetensors`."""
    return dict(read_contents(path).metadata)


def read_tensors(path: str | Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Load some tensors of a file whose header `read_contents` has checked, onto the CPU.

    Raises:
        QrloraError: the file is not what it was, or the library finds fault with it.
    """
    source = Path(path)
    try:
        with cast(Any, safe_open)(source, framework="pt", device="cpu") as file:
            return {key: cast(Tensor, file.get_tensor(key)) for key in keys}
    except (SafetensorError, OSError) as error:
        raise QrloraError(f"{source} is not a readable safetensors file: {error}.") from error


def read_contents(path: str | Path) -> Contents:
    """Read and check a file's header; nothing that it claims is allocated.

    Raises:
        QrloraError: no such file, a pickle or another kind of file, truncated, entries that are malformed, double,
            absurd or overlap; naming the key.
    """
    source = Path(path)
    if not source.is_file():
        raise QrloraError(f"{source} does not exist or is not a file.")
    if source.suffix.lower() in _PICKLES:
        raise QrloraError(f"{source} is {_PICKLE}.")
    text, available, identity = _header_text(source)
    header = _parsed(source, text)
    metadata: Any = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise QrloraError(f"{source} is not a safetensors file: its metadata is not a JSON object.")
    if len(header) > _MAX_TENSORS:
        raise QrloraError(f"{source} claims {len(header)} tensors, more than any adapter or model has; it is damaged.")
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, TensorEntry] = {}
    for key, entry in header.items():
        entries[key], span = _checked_entry(source, key, entry, available)
        spans.append((*span, key))
    _check_apart(source, spans)
    texts = {str(key): str(value) for key, value in cast(dict[str, Any], metadata).items()}
    return Contents(entries, texts, 8 + len(text), identity)


def shown(key: str) -> str:
    """A stranger's text as it may be printed: of bounded length, without control characters."""
    text = key if key.isprintable() else key.encode("unicode_escape").decode()
    return text if len(text) <= 160 else f"{text[:120]}... ({len(text)} characters)"


def identity_of(descriptor: int) -> tuple[int, ...]:
    """Which file is open, and in which state."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _header_text(source: Path) -> tuple[bytes, int, tuple[int, ...]]:
    """The header's bytes, how many bytes of tensors follow it, and which file it is."""
    try:
        with source.open("rb") as stream:
            identity = identity_of(stream.fileno())
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            for signature, what in _SIGNATURES.items():
                if length > _MAX_HEADER and start.startswith(signature):
                    raise QrloraError(f"{source} is {what}.")
            if not 2 <= length <= size - 8:
                raise QrloraError(f"{source} is not a safetensors file, or is truncated within its header.")
            if length > _MAX_HEADER:
                raise QrloraError(
                    f"{source} claims a header of {length} bytes, more than any adapter has; it is damaged."
                )
            return stream.read(length), size - 8 - length, identity
    except OSError as error:
        raise QrloraError(f"{source} cannot be read: {error.strerror or error}.") from error


def _parsed(source: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            double, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise QrloraError(f"{source} is damaged: its header has {shown(double)} twice.")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise QrloraError(f"{source} is not a safetensors file: its header is not UTF-8 text.") from error
    except (ValueError, RecursionError) as error:
        raise QrloraError(f"{source} is not a safetensors file: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise QrloraError(f"{source} is not a safetensors file: its header is not a JSON object.")
    return cast(dict[str, Any], header)


def _checked_entry(source: Path, key: str, entry: Any, available: int) -> tuple[TensorEntry, tuple[int, int]]:
    name = shown(key)
    if len(key) > _MAX_KEY or not key.isprintable():
        raise QrloraError(f"{source} is damaged or no adapter: {name} is not the name of a tensor.")
    try:
        shape = [_whole(side) for side in entry["shape"]]
        begin, end = (_whole(offset) for offset in entry["data_offsets"])
        dtype = str(entry["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise QrloraError(f"{source}: the header's entry for {name} is malformed.") from error
    if dtype not in _SIZES:
        raise QrloraError(f"{source}: {name} has dtype {shown(dtype)}, which is not one of {', '.join(_SIZES)}.")
    absurd = len(shape) > _MAX_SIDES or any(not 0 <= side <= _MAX_SIDE for side in shape)
    if absurd or math.prod(shape) > _MAX_ELEMENTS:
        raise QrloraError(
            f"{source}: {name} claims the absurd shape {shown(str(shape))}; the file is damaged or not an adapter."
        )
    if end > available:
        raise QrloraError(f"{source} is truncated: {name} ends {end - available} bytes past the end of the file.")
    if begin < 0 or end - begin != math.prod(shape) * _SIZES[dtype]:
        raise QrloraError(
            f"{source}: {name} holds {end - begin} bytes from {begin} on, which does not fit its shape {shape} in "
            f"{dtype}."
        )
    return TensorEntry(dtype, tuple(shape), begin), (begin, end)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _check_apart(source: Path, spans: list[tuple[int, int, str]]) -> None:
    """Tensors that share bytes would let a small file claim any number of large ones."""
    ordered = sorted(spans)
    for (_, end, key), (begin, _, following) in pairwise(ordered):
        if begin < end:
            raise QrloraError(f"{source} is damaged: {shown(key)} and {shown(following)} share bytes.")
