"""The opt-in small file: trained factors alone, and fingerprints by which their bases are found again."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor

from qrlora.basis import fingerprint
from qrlora.errors import QrloraError
from qrlora.formats._adapter import Adapter, Component, Header, SaveDtype, check_finite
from qrlora.formats._factors import natural_key
from qrlora.formats._header import COMPONENT_KEY, header_metadata, read_header, stored_component
from qrlora.formats._later import Later
from qrlora.formats._safetensors import read_safetensors
from qrlora.formats._saving import cast_to_save, checked_path, stored_dtype
from qrlora.formats._write_safetensors import write_safetensors

KIND_KEY = "qrlora_kind"
_KIND = "coefficients"


@dataclass(frozen=True)
class Coefficients:
    """One layer's trained factor and the fingerprint `G^T Q` of the basis it belongs to.

    Attributes:
        trained: `lora_A` for side "output", `lora_B` for "input", fp32, scale baked in.
        fingerprint: `[r, r]`, fp32.
    """

    trained: Tensor
    fingerprint: Tensor


@dataclass(frozen=True)
class CoefficientsFile:
    """What a coefficients-only file holds; `qrlora.adapter.resolve_coefficients` turns it into an `Adapter`."""

    layers: dict[str, Coefficients]
    header: Header
    component: Component
    source: str

    @property
    def trained_factor(self) -> Literal["lora_A", "lora_B"]:
        return "lora_A" if self.header.side == "output" else "lora_B"


def basis_vectors(B: Tensor, A: Tensor, side: Literal["output", "input"]) -> Tensor:
    """The basis `[d, r]` of a pair: `lora_B` on the output side, the transpose of `lora_A` on the input side."""
    return B.flatten(1) if side == "output" else A.flatten(1).T


def write_coefficients(adapter: Adapter, path: str | Path, *, save_dtype: SaveDtype = "fp32") -> Path:
    """Write the trained factors alone, about half the size; loading needs the base, and stock tools cannot open it.

    Raises:
        QrloraError: the adapter has no basis that could be recomputed, a value is not finite, or nothing can be
            written.
    """
    target = checked_path(path)
    adapter.check_low_rank("saved as coefficients only")
    adapter.check_alone("saved as coefficients only", "save it whole")
    header = adapter.header
    if header is None or header.basis is None or header.side is None or header.merged_from is not None:
        raise QrloraError(
            f"{adapter.label} has no basis that can be recomputed from the base model, so it cannot be saved as "
            "coefficients only; save it whole."
        )
    side = header.side

    def trained(name: str) -> Tensor:
        pair = adapter.layers[name]
        return cast_to_save(name, pair.A if side == "output" else pair.B, save_dtype)

    def known_by(name: str) -> Tensor:
        pair = adapter.layers[name]
        return fingerprint(basis_vectors(pair.B, pair.A, side)).float()

    tensors: dict[str, Later] = {}
    for name, pair in adapter.shapes.items():
        shape = tuple((pair.A if side == "output" else pair.B).shape)
        tensors[f"{name}.coefficients"] = Later(stored_dtype(save_dtype), shape, partial(trained, name))
        tensors[f"{name}.fingerprint"] = Later(torch.float32, (pair.rank, pair.rank), partial(known_by, name))
    metadata = {"format": "pt", KIND_KEY: _KIND, COMPONENT_KEY: adapter.component, **header_metadata(adapter)}
    return write_safetensors(target, tensors, metadata)


def is_coefficients(metadata: Mapping[str, str]) -> bool:
    """Whether a file with this metadata (`read_metadata`) holds coefficients only."""
    return metadata.get(KIND_KEY) == _KIND


def read_coefficients(path: str | Path) -> CoefficientsFile:
    """Read a coefficients-only file.

    Raises:
        QrloraError: not such a file, truncated, not finite, keys missing or unknown, naming the key.
    """
    source = Path(path)
    tensors, metadata = read_safetensors(source)
    header = read_header(source, metadata)
    if not is_coefficients(metadata) or header is None or header.side is None or header.basis is None:
        raise QrloraError(f"{source} is not a coefficients-only file; read it with load_adapter.")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if part not in ("coefficients", "fingerprint") or not name:
            raise QrloraError(f"{source}: {key} is not a key of a coefficients-only file.")
        check_finite(f"{source}: {key}", tensor)
        found.setdefault(name, {})[part] = tensor.float()
    layers: dict[str, Coefficients] = {}
    for name in sorted(found, key=natural_key):
        for part in ("coefficients", "fingerprint"):
            if part not in found[name]:
                _missing(source, f"{name}.{part}")
        layers[name] = _checked(source, name, found[name]["coefficients"], found[name]["fingerprint"], header)
    if not layers:
        raise QrloraError(f"{source} holds no tensors.")
    component = stored_component(metadata) or "transformer"
    return CoefficientsFile(layers, header, component, str(source))


def _checked(source: Path, name: str, trained: Tensor, print_: Tensor, header: Header) -> Coefficients:
    rank = trained.shape[0 if header.side == "output" else 1] if trained.ndim in (2, 4) else 0
    if not rank or print_.shape != (rank, rank):
        raise QrloraError(
            f"{source}: {name} has coefficients {list(trained.shape)} and a fingerprint {list(print_.shape)}, which do "
            "not belong together."
        )
    return Coefficients(trained, print_)


def _missing(source: Path, key: str) -> NoReturn:
    raise QrloraError(f"{source}: {key} is missing; the file is incomplete.")
