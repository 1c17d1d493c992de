"""safetensors out, with what the library leaves open: a fixed byte order of the header.

The library's own writer orders the metadata at random, so equal adapters would not be equal files.
"""

import json
import struct
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._atomic import atomic_write
from qrlora.formats._later import Later, had
from qrlora.formats._safetensors import DTYPES


@dataclass(frozen=True)
class MetadataLater:
    """Metadata that is known when all tensors were written.

    Attributes:
        widest: the same texts at their greatest length; the header has room for them, so where the tensors begin
            depends on these alone.
        get: gives them.
    """

    widest: Mapping[str, str]
    get: Callable[[], Mapping[str, str]]


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor | Later],
    metadata: Mapping[str, str] | MetadataLater | None = None,
) -> Path:
    """Write `tensors` and string `metadata` atomically; equal content gives equal bytes.

    The header needs dtypes and shapes alone, so tensors that are had later are, one at a time, in the order of their
    keys; whatever one of them raises, nothing is written.

    Raises:
        QrloraError: the file cannot be written, or a tensor is of a type safetensors files of ours do not hold.
    """
    entries = _entries(tensors)
    later = metadata if isinstance(metadata, MetadataLater) else None
    room = _header(entries, metadata.widest if isinstance(metadata, MetadataLater) else metadata)

    def chunks() -> Generator[bytes | memoryview, None, None]:
        yield room
        with closing(_one_ahead(tensors, sorted(tensors))) as values:
            yield from values

    front = None if later is None else lambda: _header(entries, later.get(), len(room))
    with closing(chunks()) as content:  # also where the file cannot be written
        return atomic_write(path, content, front=front)


def _entries(tensors: Mapping[str, Tensor | Later]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    offset = 0
    for key in sorted(tensors):
        tensor = tensors[key]
        if tensor.dtype not in DTYPES:
            raise QrloraError(f"{key} has dtype {tensor.dtype}, which cannot be stored; convert it to float32 first.")
        end = offset + tensor.nbytes
        entries[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return entries


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str] | None, size: int | None = None) -> bytes:
    """The bytes before the tensors, padded with spaces to a multiple of eight, or to `size`."""
    start: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    encoded = json.dumps({**start, **entries}, ensure_ascii=False, separators=(",", ":")).encode()
    padding = -len(encoded) % 8 if size is None else size - 8 - len(encoded)
    if padding < 0:
        raise RuntimeError(f"the header takes {len(encoded)} bytes, {-padding} more than were left for it")
    return struct.pack("<Q", len(encoded) + padding) + encoded + b" " * padding


def _one_ahead(tensors: Mapping[str, Tensor | Later], keys: Sequence[str]) -> Generator[bytes | memoryview, None, None]:
    """The tensors' bytes; while one is being written, the next is made, on one thread."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            coming: Future[bytes | memoryview] | None = None
            for index, key in enumerate(keys):
                here = coming or pool.submit(_bytes_of, key, tensors[key])
                chunk = here.result()
                following = keys[index + 1] if index + 1 < len(keys) else None
                coming = None if following is None else pool.submit(_bytes_of, following, tensors[following])
                yield chunk
    finally:
        torch.set_num_threads(threads)


def _bytes_of(key: str, tensor: Tensor | Later) -> bytes | memoryview:
    values = had(tensor)
    if values.dtype != tensor.dtype or tuple(values.shape) != tuple(tensor.shape):
        raise RuntimeError(f"{key} is {values.dtype} {values.shape}, but the header has {tensor.dtype} {tensor.shape}")
    flat = values.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
