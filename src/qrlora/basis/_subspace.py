"""Leading and trailing singular subspaces of a weight, each with a bound on its own error."""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from qrlora.basis._certificate import Ritz, leading_angle, ritz, trailing_angle
from qrlora.basis._krylov import krylov_block
from qrlora.basis._linalg import LinAlgError, as_matrix
from qrlora.basis._precision import full_precision, solving_device
from qrlora.basis._solvers import exact_block, gram_block
from qrlora.errors import QrloraError, QrloraWarning

Side = Literal["output", "input"]
"""Which singular vectors: left ones, on the layer's output (lora_B), or right ones, on its input (lora_A)."""
Solver = Literal["auto", "exact", "gram", "krylov"]

ANGLE_TOLERANCE = 0.01
"""Degrees. `auto` hands a weight to the exact solver when another solver's bound exceeds this."""

_EXACT_UP_TO = 512  # smaller side; below it the fp64 SVD takes a fraction of a second
_KRYLOV_FROM = 24  # smaller side over rank; below it the Krylov space fills over half of the side and Gram is cheaper
_POLISH_STEPS = 4  # of subspace iteration in fp64, each about a fifth of a Krylov run
_KRYLOV_ANGLE = 1.25 * ANGLE_TOLERANCE  # of its own estimate, which counts the fp32 rounding that polishing removes


@dataclass(frozen=True)
class Subspace:
    """A singular subspace of a weight, with what is known about its accuracy."""

    vectors: Tensor
    """`[d, r]`, orthonormal singular vectors in fp64, by descending singular value; signs as they came."""
    values: Tensor
    """`[r]` singular values in fp64."""
    solver: str
    """The solver that produced it: exact, gram or krylov."""
    angle: float
    """Upper bound, in degrees, on the largest principal angle to the true subspace; 90 where no gap defines one."""


def leading_subspace(
    weight: Tensor,
    rank: int,
    *,
    side: Side = "output",
    solver: Solver = "auto",
    fp64: bool = False,
    layer: str = "weight",
    columns: slice | None = None,
) -> Subspace:
    """The subspace of the `rank` largest singular values, or of a slice of them.

    Every solver's proposal goes through a Rayleigh-Ritz step in fp64, whose residuals over the gap to value rank + 1
    bound the angle (Davis and Kahan 1970). Energy captured says nothing here: a subspace with 99.8 % of it can be 80
    degrees off.

    Arguments:
        weight: `[out, in]` or `[out, in, kh, kw]`, bf16 / fp16 / fp32 / fp64; never modified.
        rank: number of vectors, at most min(out, in * kh * kw).
        side: `output` for left singular vectors (d = out), `input` for right ones (d = in * kh * kw).
        solver: `exact` (SVD), `gram` (eigh of the smaller Gram matrix), `krylov` (block Krylov, seeded), or `auto`:
            exact up to 512 on the smaller side; else krylov (rank up to 1/24 of that side), else gram, whichever
            first proves `ANGLE_TOLERANCE`; else exact, with a `QrloraWarning`.
        fp64: run the solver itself in fp64 too (slower; the exact solver within `auto` always does).
        layer: the name used in messages.
        columns: which of the `rank` vectors to return, in order of singular values; all where None. Disjoint slices of
            one subspace are orthogonal to each other, and `angle` is that of the slice.

    Returns:
        The subspace, in fp64, on the weight's device (on the CPU for mps, which has no fp64).

    Raises:
        QrloraError: a rank above the limit, non-finite values, an unsuitable weight, an unknown side or solver.
    """
    problem = _prepare(weight, rank, side, layer, leading=True, columns=columns)
    check_choice("solver", solver, get_args(Solver), layer)
    with full_precision(problem.matrix.device):
        if solver != "auto":
            return _solve(problem, solver, fp64)
        smaller = min(problem.matrix.shape)
        if smaller <= _EXACT_UP_TO:
            return _solve(problem, "exact", True)
        fast = ("krylov", "gram") if smaller >= _KRYLOV_FROM * rank else ("gram",)
        return _certified(problem, fast, fp64)


def trailing_subspace(
    weight: Tensor,
    rank: int,
    *,
    side: Side = "output",
    solver: Solver = "auto",
    layer: str = "weight",
    columns: slice | None = None,
) -> Subspace:
    """The subspace of the `rank` smallest singular values: the last columns of the thin U (or V for side `input`).

    Only fp64 tells neighbouring small singular values apart, so both solvers, `exact` and `gram`, run in it, and
    `krylov` is refused. Where the wanted side is the larger one, the null space beyond the thin factor is not part of
    the answer. Arguments, result and errors otherwise as for `leading_subspace`; `auto` is exact up to 512 on the
    smaller side and gram beyond.
    """
    problem = _prepare(weight, rank, side, layer, leading=False, columns=columns)
    check_choice("solver", solver, ("auto", "exact", "gram"), layer)
    with full_precision(problem.matrix.device):
        if solver != "auto":
            return _solve(problem, solver, True)
        if min(problem.matrix.shape) <= _EXACT_UP_TO:
            return _solve(problem, "exact", True)
        return _certified(problem, ("gram",), True)


def check_rank(rank: int, limit: int, layer: str) -> None:
    """Raises QrloraError, naming the layer and its limit, unless 1 <= rank <= limit."""
    if rank < 1:
        raise QrloraError(f"{layer}: the rank must be at least 1, not {rank}.")
    if rank > limit:
        raise QrloraError(
            f"{layer}: rank {rank} exceeds this layer's limit of {limit}; "
            "lower the rank or leave the layer out of target_modules."
        )


def oriented(weight: Tensor, side: Side, layer: str) -> Tensor:
    """The weight's matrix `[d, n]` with the wanted side first, in fp32 (fp64 stays), where decompositions run.

    Raises:
        QrloraError: non-finite values, an unsuitable weight or an unknown side.
    """
    check_choice("side", side, get_args(Side), layer)
    matrix = as_matrix(weight, layer=layer)
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    matrix = matrix.to(device=solving_device(matrix.device), dtype=dtype)
    lowest, highest = _extremes(matrix)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise QrloraError(f"{layer}: the weight holds NaN or infinite values; check or download the base model again.")
    return matrix if side == "output" else matrix.T


def _extremes(matrix: Tensor) -> tuple[float, float]:
    """Smallest and largest entry, nan where one is nan: one read, where `isfinite` and `abs` make copies."""
    lowest, highest = torch.aminmax(matrix)
    return float(lowest), float(highest)


@dataclass(frozen=True)
class _Problem:
    matrix: Tensor  # [d, n], the wanted side first
    rank: int
    exponent: int  # the weight is matrix * 2^exponent
    leading: bool
    layer: str
    start: int  # the slice of the rank vectors that is returned
    stop: int

    @cached_property
    def turned(self) -> Tensor:
        """The transpose `[n, d]`, contiguous on a CPU, where a product with a transposed view takes twice as long."""
        return self.matrix.T.contiguous() if self.matrix.device.type == "cpu" else self.matrix.T


def _prepare(weight: Tensor, rank: int, side: Side, layer: str, *, leading: bool, columns: slice | None) -> _Problem:
    matrix = oriented(weight, side, layer)
    check_rank(rank, min(matrix.shape), layer)
    start, stop, _ = (columns or slice(None)).indices(rank)
    # Only extreme weights are rescaled (exactly, and a copy): their Gram matrices would overflow or underflow.
    exponent = math.frexp(max(map(abs, _extremes(matrix))))[1]
    if abs(exponent) <= 20:
        return _Problem(matrix, rank, 0, leading, layer, start, stop)
    return _Problem(_shifted(matrix, -exponent), rank, exponent, leading, layer, start, stop)


def _shifted(values: Tensor, exponent: int) -> Tensor:
    """`values * 2^exponent`, in two steps since 2^exponent itself may be out of range."""
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)


def _subspace(problem: _Problem, vectors: Tensor, values: Tensor, solver: str, angle: float) -> Subspace:
    part = slice(problem.start, problem.stop)
    return Subspace(vectors[:, part].contiguous(), _shifted(values[part], problem.exponent), solver, angle)


def _solve(problem: _Problem, solver: str, fp64: bool) -> Subspace:
    matrix, rank = problem.matrix, problem.rank
    thin = min(matrix.shape)
    # The spare columns hold value rank + 1, from which the gap is measured, and speed up the power steps.
    columns = min(thin, rank + rank // 4 + 8)
    try:
        if solver == "exact":
            block = exact_block(matrix, columns, leading=problem.leading, fp64=fp64)
        elif solver == "gram":
            block = gram_block(matrix, columns, leading=problem.leading, fp64=fp64)
        else:
            dtype = torch.float64 if fp64 else matrix.dtype
            block = krylov_block(matrix.to(dtype), columns, rank, problem.turned.to(dtype), _KRYLOV_ANGLE)
        return _leading(problem, block, solver) if problem.leading else _trailing(problem, block, solver)
    except LinAlgError as error:
        raise QrloraError(f"{problem.layer}: the {solver} solver did not converge ({error}); try another.") from error


def _leading(problem: _Problem, block: Tensor, solver: str) -> Subspace:
    rank = problem.rank
    found = ritz(problem.matrix, block, problem.turned)
    angle = _leading_angle(problem, found)
    for left in range(_POLISH_STEPS - 1, -1, -1):
        if angle <= ANGLE_TOLERANCE:
            break
        better = ritz(problem.matrix, found.image, problem.turned)
        better_angle = _leading_angle(problem, better)
        if better_angle >= angle:
            break
        pace = better_angle / angle
        found, angle = better, better_angle
        if angle * pace**left > ANGLE_TOLERANCE:
            break  # the steps that are left would not do
    return _subspace(problem, found.vectors[:, :rank], found.values[:rank], solver, angle)


def _trailing(problem: _Problem, block: Tensor, solver: str) -> Subspace:
    found = ritz(problem.matrix, block, problem.turned)
    first = block.shape[1] - problem.rank
    thin = min(problem.matrix.shape)
    angles = [trailing_angle(found, problem.rank - problem.start, thin)]
    if problem.stop < problem.rank:
        angles.append(trailing_angle(found, problem.rank - problem.stop, thin))
    return _subspace(problem, found.vectors[:, first:], found.values[first:], solver, _added(angles))


def _leading_angle(problem: _Problem, found: Ritz) -> float:
    angles = [leading_angle(found, problem.stop)]
    if problem.start > 0:
        angles.append(leading_angle(found, problem.start))
    return _added(angles)


def _added(angles: list[float]) -> float:
    """Bound for the difference of nested subspaces: the sine of an angle is the norm of a difference of projectors."""
    if len(angles) == 1:
        return angles[0]
    return math.degrees(math.asin(min(1.0, sum(math.sin(math.radians(angle)) for angle in angles))))


def _certified(problem: _Problem, solvers: tuple[str, ...], fp64: bool) -> Subspace:
    """The first of the solvers' subspaces whose bound is good, otherwise the exact one, and a warning that says so."""
    failures: list[str] = []
    for solver in solvers:
        try:
            found = _solve(problem, solver, fp64)
        except QrloraError as error:  # no convergence: the next solver may
            failures.append(str(error))
            continue
        if found.angle <= ANGLE_TOLERANCE:
            return found
        failures.append(f"{solver} is certain to {found.angle:.2g} degrees only")
    exact = _solve(problem, "exact", True)
    warnings.warn(
        f"{problem.layer}: no fast solver found the rank {problem.rank} subspace to {ANGLE_TOLERANCE} degrees "
        f"({'; '.join(failures)}), so the exact one took over (certain to {exact.angle:.2g} degrees).",
        QrloraWarning,
        stacklevel=3,
    )
    return exact


def check_choice(what: str, value: str, allowed: tuple[str, ...], layer: str) -> None:
    """Raises QrloraError, naming the layer and what is allowed, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise QrloraError(f"{layer}: {what} {value!r} is not one of {', '.join(allowed)}.")
