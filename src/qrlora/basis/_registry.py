"""The named bases: what a basis function gets and gives, how one is registered, and `make_basis`."""

import difflib
import math
from collections.abc import Callable
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
    """`[d, r]`, orthonormal columns in fp32, d = out for side `output` and in (* kh * kw) for side `input`."""
    name: str
    side: Side
    solver: str
    """The solver that produced the span; the basis's own name where none was needed."""
    angle: float
    """Upper bound, in degrees, on the largest principal angle to the true span; 90 where no gap defines one."""


@dataclass(frozen=True)
class BasisRequest:
    """What a basis function works from."""

    matrix: Tensor
    """`[d, n]`, finite, fp32 or fp64, read only: `W` for side output, `W^T` for side input."""
    rank: int
    solver: Solver
    seed: int
    layer: str


@dataclass(frozen=True)
class BasisColumns:
    """What a basis function returns."""

    vectors: Tensor
    """`[d, rank]`, orthonormal to fp64 rounding, signs fixed."""
    solver: str
    angle: float


BasisFunction = Callable[[BasisRequest], BasisColumns]
RankLimit = Callable[[int, int], int]


@dataclass(frozen=True)
class _Entry:
    function: BasisFunction
    limit: RankLimit


_registry: dict[str, _Entry] = {}


def register_basis(name: str, *, limit: RankLimit = min) -> Callable[[BasisFunction], BasisFunction]:
    """Decorator that makes a function available as the basis `name`.

    Arguments:
        name: what `AdapterSpec.basis`, the command line and file headers call it.
        limit: the largest rank for a matrix `[d, n]`, as a function of d and n; by default the smaller one.

    Raises:
        QrloraError: the name is taken.
    """

    def register(function: BasisFunction) -> BasisFunction:
        if name in _registry:
            raise QrloraError(f"a basis named {name!r} is registered already; choose another name.")
        _registry[name] = _Entry(function, limit)
        return function

    return register


def basis_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_registry))


def rank_limit(weight: Tensor, name: str, *, side: Side = "output", layer: str = "weight") -> int:
    """The largest rank that basis `name` allows for `weight` (`[out, in]` or `[out, in, kh, kw]`) on `side`.

    Raises:
        QrloraError: an unknown basis or an unsuitable weight.
    """
    entry = _entry(name, layer)
    check_choice("side", side, get_args(Side), layer)
    out, inputs = as_matrix(weight, layer=layer).shape
    return entry.limit(out, inputs) if side == "output" else entry.limit(inputs, out)


def make_basis(
    weight: Tensor,
    rank: int,
    name: str = "qr",
    *,
    side: Side = "output",
    solver: Solver = "auto",
    seed: int = 0,
    layer: str = "weight",
) -> Basis:
    """The basis `name` of a weight.

    `qr`: `Q` of the QR decomposition of the rank-r truncation of W; `svd`: leading singular vectors; `minor`:
    trailing ones; `random`: a seeded Gaussian, orthonormalised. Side `input` treats W^T the same way. Signs are
    fixed: `diag(R) > 0` for qr and random, the entry of largest magnitude of a column positive for svd and minor.

    Arguments:
        weight: `[out, in]` or `[out, in, kh, kw]`, any floating dtype and device; never modified.
        rank: number of columns, at most `rank_limit(weight, name, side=side)`.
        name: one of `basis_names()`.
        side: the side of the layer that the basis lives on.
        solver: as for `leading_subspace` (minor: as for `trailing_subspace`; random uses none).
        seed: of the random basis alone; the others do not depend on it.
        layer: the name used in messages.

    Returns:
        The basis, fp32, on the weight's device.

    Raises:
        QrloraError: an unknown basis, a rank above the limit, non-finite values or an unsuitable weight.
    """
    limit = rank_limit(weight, name, side=side, layer=layer)
    check_rank(rank, limit, layer)
    matrix = oriented(weight, side, layer)
    with full_precision(matrix.device):
        columns = _entry(name, layer).function(BasisRequest(matrix, rank, solver, seed, layer))
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
