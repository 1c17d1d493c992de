"""Rayleigh-Ritz in fp64 on a block, and what its residuals prove about the subspace it holds."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qrlora.basis._linalg import norms, orthonormal, qr, svd, times

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Ritz:
    """Approximate singular triplets of `M [d, n]` from a block: `M^T P = V S` exactly, `M V = P S + residual`."""

    vectors: Tensor
    """`P [d, b]`, orthonormal, fp64, by descending value."""
    values: Tensor
    """`S [b]`."""
    image: Tensor
    """`M V [d, b]`: one power step ahead of `vectors`."""
    residuals: Tensor
    """`[b]`, column norms of `M V - P S`."""
    noise: float
    """The fp64 rounding that a residual norm may hide."""


def ritz(matrix: Tensor, block: Tensor, turned: Tensor | None = None) -> Ritz:
    """Rayleigh-Ritz of `matrix [d, n]` (fp32 or fp64) on the span of `block [d, b]`, b <= min(d, n), in fp64.

    It works on singular values, never on their squares, so values down to 1e-15 of the largest stay resolved. `turned`
    is the matrix's transpose, for whoever has it contiguous, which is faster on a CPU.
    """
    start = orthonormal(block.double())
    q, r = qr(times(matrix.T if turned is None else turned, start))
    a, values, ch = svd(r)
    vectors = start @ ch.T
    image = times(matrix, q @ a)
    residuals = norms(image - vectors * values)
    noise = _EPS * float(values[0]) * math.sqrt(max(matrix.shape))
    return Ritz(vectors, values, image, residuals, noise)


def leading_angle(found: Ritz, rank: int) -> float:
    """Bound, in degrees, on the angle between the first `rank` Ritz vectors and the leading singular subspace.

    With `u` an unwanted singular vector of value `s`, `u^T p_i = sigma_i u^T residual_i / (s^2 - sigma_i^2)`; summed
    over the unwanted ones and over i this is the sin-theta theorem (Davis and Kahan 1970, Wedin 1972) with a gap for
    each column. Unwanted values are taken to be at most the next Ritz value plus its residual, which holds once the
    block has caught every large direction; a seeded Gaussian start misses one with probability 0.
    """
    d = found.vectors.shape[0]
    if rank == d:
        return 0.0
    # Past min(d, n) every singular value is zero.
    more = rank < found.values.shape[0]
    ceiling = float(found.values[rank] + found.residuals[rank]) + found.noise if more else 0.0
    return _to_degrees(_sines(found.values[:rank], found.residuals[:rank], ceiling, found.noise, above=True))


def trailing_angle(found: Ritz, rank: int, thin: int) -> float:
    """Bound, in degrees, for the last `rank` Ritz vectors against the last `rank` columns of the thin `U [d, thin]`.

    They must be told from the larger values above them and, where d > thin, from the null space below them.
    """
    d, b = found.vectors.shape
    if rank == d:
        return 0.0
    values, residuals = found.values[b - rank :], found.residuals[b - rank :]
    parts: list[Tensor] = []
    if rank < thin:
        floor = float(found.values[b - rank - 1] - found.residuals[b - rank - 1]) - found.noise
        parts.append(_sines(values, residuals, floor, found.noise, above=False))
    if d > thin:
        parts.append(_sines(values, residuals, 0.0, found.noise, above=True))
    return _to_degrees(torch.cat(parts))


def _sines(values: Tensor, residuals: Tensor, edge: float, noise: float, *, above: bool) -> Tensor:
    """Per column, the sine of the angle to the singular vectors past `edge`; `above`: `values` must exceed it."""
    gap = values.square() - edge * edge
    gap = gap if above else -gap
    error = values * (residuals + noise) + abs(edge) * noise
    return torch.where((gap > 0) & (edge >= 0), error / gap, torch.inf)


def _to_degrees(sines: Tensor) -> float:
    return math.degrees(math.asin(min(1.0, float(norms(sines)))))
