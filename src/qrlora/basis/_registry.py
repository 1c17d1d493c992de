"""The named bases: what a basis function gets and gives, how one is registered, and `make_basis`."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from qrlora.basis._linalg import as_matrix
from qrlora.basis._precision import full_precision
from qrlora.basis._subspace import Side, Solver, check_choice, check_rank, oriented
from qrlora.errors import QrloraError


@dataclass(frozen=True)
class Basis:
    """The frozen factor of an adapted layer: lora_B = vectors (side output) or lora_A = vectors^T (side input)."""

    vectors: Tensor
    """`[d, r]` in fp32, d = out for side `output` and in (* kh * kw) for side `input`.

    Its columns are orthonormal, unless the basis is one for which `is_orthonormal(name)` says no (ica).
    """
    name: str
    side: Side
    solver: str
    """The solver that produced the span; the basis's own name where none was needed."""
    angle: float
    """Upper bound, in degrees, on the largest principal angle to the true span; 90 where no gap defines one.

    For ica, which no gap defines, the angle by which its last iteration still turned a component.
    """


@dataclass(frozen=True)
class Band:
    """One of `count` equal slices of a basis, in order of singular values; the first is slice 0."""

    index: int = 0
    count: int = 1

    def columns(self, rank: int) -> slice:
        """The columns of the whole basis that a slice `rank` wide has."""
        return slice(self.index * rank, (self.index + 1) * rank)


@dataclass(frozen=True)
class BasisRequest:
    """What a basis function works from."""

    matrix: Tensor
    """`[d, n]`, finite, fp32 or fp64, read only: `W` for side output, `W^T` for side input."""
    rank: int
    side: Side
    solver: Solver
    seed: int
    layer: str
    band: Band = Band()
    """The slice asked for, `rank` wide; another one than the whole is asked of bases registered with `bands` alone."""


@dataclass(frozen=True)
class BasisColumns:
    """What a basis function returns."""

    vectors: Tensor
    """`[d, rank]`, orthonormal to fp64 rounding (unless registered otherwise), order and signs fixed."""
    solver: str
    angle: float


BasisFunction = Callable[[BasisRequest], BasisColumns]
RankLimit = Callable[[int, int], int]
SecondsFunction = Callable[[Sequence[tuple[int, int]], int, torch.device], float]


@dataclass(frozen=True)
class _Entry:
    function: BasisFunction
    limit: RankLimit
    orthonormal: bool
    seconds: SecondsFunction | None
    bands: bool


_registry: dict[str, _Entry] = {}


def register_basis(
    name: str,
    *,
    limit: RankLimit = min,
    orthonormal: bool = True,
    seconds: SecondsFunction | None = None,
    bands: bool = False,
) -> Callable[[BasisFunction], BasisFunction]:
    """Decorator that makes a function available as the basis `name`.

    Arguments:
        name: what `AdapterSpec.basis`, the command line and file headers call it.
        limit: the largest rank for a matrix `[d, n]`, as a function of d and n; by default the smaller one.
        orthonormal: whether its columns are orthonormal, so that any rotation of them is as good a basis.
        seconds: for a basis that can take hours: about how long it takes for weights of shapes `[out, in]` at a rank on
            a device.
        bands: whether its columns have an order, so that it can be cut into bands.

    Raises:
        QrloraError: the name is taken.
    """

    def register(function: BasisFunction) -> BasisFunction:
        if name in _registry:
            raise QrloraError(f"a basis named {name!r} is registered already; choose another name.")
        _registry[name] = _Entry(function, limit, orthonormal, seconds, bands)
        return function

    return register


def basis_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_registry))


def is_orthonormal(name: str) -> bool:
    """Whether the columns of basis `name` are orthonormal.

    Raises:
        QrloraError: an unknown basis.
    """
    return _entry(name, "basis").orthonormal


def has_bands(name: str) -> bool:
    """Whether basis `name` can be cut into bands.

    Raises:
        QrloraError: an unknown basis.
    """
    return _entry(name, "basis").bands


def basis_seconds(
    name: str, shapes: Sequence[tuple[int, int]], rank: int, device: torch.device | None = None
) -> float | None:
    """About how long basis `name` takes at most for weights of `shapes`; None where it is never worth a warning.

    It measures a part of the work on the first shape and extrapolates.

    Arguments:
        name: one of `basis_names()`.
        shapes: `[out, in]` of every weight, as matrices.
        rank: number of columns.
        device: where it will be computed; the CPU where None.

    Raises:
        QrloraError: an unknown basis.
    """
    seconds = _entry(name, "basis").seconds
    return None if seconds is None else seconds(shapes, rank, device or torch.device("cpu"))


def rank_limit(weight: Tensor, name: str, *, side: Side = "output", layer: str = "weight", bands: int = 1) -> int:
    """The largest rank that basis `name` allows for `weight` (`[out, in]` or `[out, in, kh, kw]`) on `side`.

    Where the basis is cut into `bands`, it is the largest rank of each.

    Raises:
        QrloraError: an unknown basis or an unsuitable weight.
    """
    entry = _entry(name, layer)
    check_choice("side", side, get_args(Side), layer)
    out, inputs = as_matrix(weight, layer=layer).shape
    return (entry.limit(out, inputs) if side == "output" else entry.limit(inputs, out)) // bands


def make_basis(
    weight: Tensor,
    rank: int,
    name: str = "qr",
    *,
    side: Side = "output",
    solver: Solver = "auto",
    seed: int = 0,
    layer: str = "weight",
    band: Band | None = None,
) -> Basis:
    """The basis `name` of a weight.

    `qr`: `Q` of the QR decomposition of the rank-r truncation of W; `svd`: leading singular vectors; `minor`:
    trailing ones; `random`: a seeded Gaussian, orthonormalised. Side `input` treats W^T the same way. `ica`: the
    sources of FastICA for side `output`, its mixing matrix for side `input`; these columns are not orthonormal. Signs
    are fixed: `diag(R) > 0` for qr and random, the entry of largest magnitude of a column positive for svd and minor
    (of a mixing column for ica).

    Arguments:
        weight: `[out, in]` or `[out, in, kh, kw]`, any floating dtype and device; never modified.
        rank: number of columns, at most `rank_limit(weight, name, side=side)`.
        name: one of `basis_names()`.
        side: the side of the layer that the basis lives on.
        solver: as for `leading_subspace` (minor: as for `trailing_subspace`; random and ica use none).
        seed: of the random basis alone; the others do not depend on it.
        layer: the name used in messages.
        band: the slice of a basis of `rank * band.count` singular vectors to make the basis of (Freq-MoE's spectral
            bands): bands of one weight are orthogonal to each other. For qr, svd and minor.

    Returns:
        The basis, fp32, on the weight's device.

    Raises:
        QrloraError: an unknown basis, a rank above the limit, non-finite values, an unsuitable weight, or a band of a
            basis that has none.
    """
    band = band or Band()
    if band.count > 1 and not has_bands(name):
        raise QrloraError(f"{layer}: basis {name!r} has no order by singular values and cannot be cut into bands.")
    limit = rank_limit(weight, name, side=side, layer=layer, bands=band.count)
    check_rank(rank, limit, layer)
    matrix = oriented(weight, side, layer)
    with full_precision(matrix.device):
        columns = _entry(name, layer).function(BasisRequest(matrix, rank, side, solver, seed, layer, band))
        vectors = columns.vectors.to(device=weight.device, dtype=torch.float32)
    # Rounding to fp32 turns the span a little, too.
    rounding = math.degrees(torch.finfo(torch.float32).eps / 2 * math.sqrt(rank))
    return Basis(vectors, name, side, columns.solver, min(90.0, columns.angle + rounding))


def _entry(name: str, layer: str) -> _Entry:
    if name not in _registry:
        near = difflib.get_close_matches(name, _registry, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise QrloraError(f"{layer}: there is no basis {name!r}, only {', '.join(basis_names())}{hint}")
    return _registry[name]
