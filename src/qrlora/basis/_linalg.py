"""Small typed pieces of linear algebra: weights as matrices, decompositions, signs, angles."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qrlora.basis._precision import full_precision, solving_device
from qrlora.errors import QrloraError

_lapack: Any = torch.linalg  # its functions carry no types

LinAlgError: type[RuntimeError] = _lapack.LinAlgError

_CHUNK = 1 << 20  # elements of a weight held in fp64 at a time (8 MiB, which caches keep)


def as_matrix(weight: Tensor, groups: int = 1, layer: str = "weight") -> Tensor:
    """A layer's weight as the matrix its forward multiplies by.

    Arguments:
        weight: a Linear weight `[out, in]` or a Conv2d weight `[out, in, kh, kw]`, floating point, on any device but
            meta.
        groups: the convolution's groups; only 1 has such a matrix.
        layer: the name used in error messages.

    Returns:
        `[out, in]` or `[out, in * kh * kw]`, a view where torch allows it, dtype and device unchanged.

    Raises:
        QrloraError: grouped convolution, another number of dimensions, an empty weight, or one that is not floating
        point.
    """
    if groups != 1:
        raise QrloraError(
            f"{layer}: a convolution with groups={groups} has no single weight matrix and cannot be adapted; "
            "leave this layer out of target_modules."
        )
    if weight.dim() not in (2, 4):
        raise QrloraError(
            f"{layer}: a weight of shape {tuple(weight.shape)} is neither a Linear's [out, in] nor a Conv2d's "
            "[out, in, kh, kw]; leave this layer out of target_modules."
        )
    if weight.numel() == 0:
        raise QrloraError(
            f"{layer}: the weight of shape {tuple(weight.shape)} is empty; load the base model's weights first."
        )
    if weight.is_meta:
        raise QrloraError(
            f"{layer}: the weight is on the meta device and has no values; load the base model's weights first."
        )
    if not weight.is_floating_point():
        raise QrloraError(
            f"{layer}: a weight of dtype {weight.dtype} looks packed or quantised; pass its dequantised values instead."
        )
    return weight.detach().flatten(1)


def norms(columns: Tensor) -> Tensor:
    """Euclidean norm of every column of `[d, b]`, or of a vector `[d]`."""
    return columns.square().sum(dim=0).sqrt()


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD: `U [m, k]`, values `[k]` descending, `V^T [k, n]`."""
    u, s, vh = _lapack.svd(matrix, full_matrices=False)
    return u, s, vh


def qr(block: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR decomposition: `Q [d, min(d, n)]`, `R [min(d, n), n]`, signs as LAPACK leaves them."""
    q, r = _lapack.qr(block)
    return q, r


def symmetric(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[k]`, ascending, and eigenvectors `[k, k]` of a symmetric matrix."""
    values, vectors = _lapack.eigh(matrix)
    return values, vectors


def eigenvectors(symmetric: Tensor) -> Tensor:
    """Eigenvectors `[k, k]` of a symmetric matrix, by descending eigenvalue."""
    _, ascending = _lapack.eigh(symmetric)
    return torch.flip(ascending, (1,))


def orthonormal(block: Tensor) -> Tensor:
    """Orthonormal columns that span `block [d, b]`, b <= d; a rank-deficient block is completed (Householder)."""
    return qr(block)[0]


def quick_orthonormal(block: Tensor) -> Tensor:
    """`orthonormal` by Cholesky decompositions of Gram matrices, where the block is well enough conditioned for that.

    Products instead of reflections: several times faster on tall blocks (Yamamoto and others 2015, "Roundoff error
    analysis of the CholeskyQR2 algorithm").
    """
    found = block
    for _ in range(2):
        factor, failed = _lapack.cholesky_ex(found.T @ found)
        if bool(failed):
            return orthonormal(block)
        found = _lapack.solve_triangular(factor.T, found, upper=True, left=False)
    error = found.T @ found - torch.eye(found.shape[1], dtype=found.dtype, device=found.device)
    return found if float(error.abs().amax()) <= 100 * torch.finfo(found.dtype).eps else orthonormal(block)


def mapped(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Right singular vectors `[n, b]` of `matrix [d, n]` to left ones `[d, b]`."""
    return orthonormal(matrix @ vectors)


def positive_qr(block: Tensor) -> Tensor:
    """`Q [d, min(d, n)]` of the QR decomposition of `block [d, n]` that has `diag(R) >= 0` (unique where it is > 0)."""
    q, r = qr(block)
    return q * _signs(torch.diagonal(r))


def positive_peaks(vectors: Tensor) -> Tensor:
    """`vectors [d, r]` with the entry of largest magnitude (the first such) of every column made positive."""
    peaks = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * _signs(vectors.gather(0, peaks))


def _signs(values: Tensor) -> Tensor:
    return torch.where(values < 0, -torch.ones_like(values), torch.ones_like(values))


def _row_chunks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    # A row chunk of a transposed view is a strided column chunk: the fp64 copy makes it dense either way.
    rows = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        chunk = slice(start, min(start + rows, matrix.shape[0]))
        yield chunk, matrix[chunk].double()


def times(matrix: Tensor, block: Tensor) -> Tensor:
    """`matrix [d, n] @ block [n, b]` in fp64, without an fp64 copy of the whole matrix."""
    return torch.cat([rows @ block for _, rows in _row_chunks(matrix)])


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """Seeded standard normal `[rows, columns]`, fp64, drawn on the CPU: the same for every device and default dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")


def principal_angle(a: Tensor, b: Tensor) -> float:
    """The largest principal angle between two subspaces of equal dimension.

    Computed through its sine, `||(I - A A^T) B||_2` (Bjorck and Golub 1973), in fp64, so that small angles keep their
    digits where the cosine would lose everything below 1e-6 degrees.

    Arguments:
        a, b: `[d, r]`, full column rank, orthonormal or not; any floating dtype and device.

    Returns:
        Degrees, 0 to 90.

    Raises:
        QrloraError: the shapes differ, or there are more columns than rows.
    """
    if a.shape != b.shape or a.dim() != 2 or a.shape[0] < a.shape[1]:
        raise QrloraError(
            f"a principal angle needs bases of one shape [d, r] with d >= r, not {tuple(a.shape)} and {tuple(b.shape)}."
        )
    device = solving_device(a.device)
    with full_precision(device):
        first, second = (orthonormal(x.detach().to(device).double()) for x in (a, b))
        _, sines, _ = svd(second - first @ (first.T @ second))
        return math.degrees(math.asin(min(1.0, float(sines[0]))))
