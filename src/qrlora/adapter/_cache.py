"""Bases are computed once a weight: kept in memory for the process, and on disk for the next run."""

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from qrlora.adapter._spec import AdapterSpec
from qrlora.basis import Basis, as_matrix, is_orthonormal, make_basis, weight_hash
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import read_safetensors, write_safetensors

_KEY = "qrlora_basis"
_VERSION = 1
_ORTHONORMAL = 1e-4
_memory: dict[str, Basis] = {}


def default_cache_folder() -> Path:
    """`QRLORA_CACHE`, or `qrlora` in the platform's cache folder."""
    chosen = os.environ.get("QRLORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "qrlora"


def layer_seed(seed: int, layer: str) -> int:
    """A seed for one layer, the same whatever other layers there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{layer}".encode()).digest()[:6])


class BasisCache:
    """Bases by the content of their weight, shared by all adapters of the process and kept in a folder.

    Args:
        folder: where entries are kept, one file each; `default_cache_folder()` where None.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_cache_folder()
        self._writable = True
        self._writing = Lock()

    def get(self, weight: Tensor, spec: AdapterSpec, layer: str) -> Basis:
        """The basis of `weight` that `spec` asks for: remembered, read, or computed and then kept.

        An entry that is corrupt or of another weight is rebuilt with a `QrloraWarning`, and a folder that cannot be
        written is told in one, too.

        Args:
            weight: dense, `[out, in]` or `[out, in, kh, kw]`.
            spec: its basis, rank, side, band, solver and seed matter.
            layer: the name used in messages, and in the seed of a random basis.

        Returns:
            The basis, on the CPU. Its tensor is shared: do not modify it.

        Raises:
            QrloraError: what `make_basis` refuses.
        """
        wanted = _wanted(weight, spec, layer)
        key = _key(wanted)
        if key not in _memory:
            _memory[key] = self._from_disk(key, wanted, weight, spec) or self._computed(
                key, wanted, weight, spec, layer
            )
        return _memory[key]

    def holds(self, weight: Tensor, spec: AdapterSpec, layer: str) -> bool:
        """Whether `get` would find the basis in memory or on disk (where it may still turn out damaged)."""
        key = _key(_wanted(weight, spec, layer))
        return key in _memory or self._path(key).exists()

    @staticmethod
    def forget() -> None:
        """Drop what is kept in memory; the folder stays."""
        _memory.clear()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _from_disk(self, key: str, wanted: dict[str, Any], weight: Tensor, spec: AdapterSpec) -> Basis | None:
        path = self._path(key)
        if not path.exists():
            return None
        try:
            tensors, metadata = read_safetensors(path)
            return _verified(path, tensors, metadata, wanted, weight, spec)
        except QrloraError as error:
            warnings.warn(f"an entry of the basis cache is rebuilt: {error}", QrloraWarning, stacklevel=4)
            return None

    def _computed(self, key: str, wanted: dict[str, Any], weight: Tensor, spec: AdapterSpec, layer: str) -> Basis:
        made = make_basis(
            weight,
            spec.rank,
            spec.basis,
            side=spec.side,
            solver=spec.solver,
            seed=wanted["seed"],
            layer=layer,
            band=spec.slice,
        )
        basis = Basis(made.vectors.cpu().contiguous(), made.name, made.side, made.solver, made.angle)
        with self._writing:
            if self._writable:
                self._keep(key, wanted, basis)
        return basis

    def _keep(self, key: str, wanted: dict[str, Any], basis: Basis) -> None:
        entry = wanted | {"found_by": basis.solver, "angle": basis.angle, "checksum": _checksum(basis.vectors)}
        try:
            write_safetensors(self._path(key), {"vectors": basis.vectors}, {_KEY: json.dumps(entry, sort_keys=True)})
        except QrloraError as error:
            self._writable = False  # said once, not once a layer
            warnings.warn(f"the bases are not kept for the next run: {error}", QrloraWarning, stacklevel=5)


def _wanted(weight: Tensor, spec: AdapterSpec, layer: str) -> dict[str, Any]:
    """What identifies an entry. Only the random basis depends on a seed, so the others are shared by all seeds."""
    wanted: dict[str, Any] = {
        "version": _VERSION,
        "weight": weight_hash(weight),
        "basis": spec.basis,
        "rank": spec.rank,
        "side": spec.side,
        "solver": spec.solver,
        "seed": layer_seed(spec.seed, layer) if spec.basis == "random" else 0,
    }
    return wanted if spec.band is None else wanted | {"band": spec.band}


def _key(wanted: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:40]


def _checksum(vectors: Tensor) -> str:
    return hashlib.sha256(vectors.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _verified(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    wanted: dict[str, Any],
    weight: Tensor,
    spec: AdapterSpec,
) -> Basis:
    try:
        entry: dict[str, Any] = json.loads(metadata[_KEY])
        vectors = tensors["vectors"]
        same = all(entry[name] == value for name, value in wanted.items())
        solver, angle, checksum = str(entry["found_by"]), float(entry["angle"]), str(entry["checksum"])
    except (KeyError, TypeError, ValueError) as error:
        raise QrloraError(f"{path} is not an entry of this cache.") from error
    if not same:
        raise QrloraError(f"{path} belongs to another weight or basis.")
    out, inputs = as_matrix(weight).shape
    shape = (out if spec.side == "output" else inputs, spec.rank)
    if vectors.dtype != torch.float32 or tuple(vectors.shape) != shape or _checksum(vectors) != checksum:
        raise QrloraError(f"{path} is damaged (its checksum or shape is wrong).")
    if not bool(torch.isfinite(torch.stack(torch.aminmax(vectors))).all()):  # one read of the vectors
        raise QrloraError(f"{path} is damaged (its vectors are not finite).")
    error = float((vectors.T @ vectors - torch.eye(spec.rank)).abs().max()) if is_orthonormal(spec.basis) else 0.0
    if error > _ORTHONORMAL:
        raise QrloraError(f"{path} is damaged (its vectors are not orthonormal).")
    return Basis(vectors, spec.basis, spec.side, solver, angle)
