"""Full decompositions that propose a block with the wanted singular subspace: `_certificate` judges it."""

import torch
from torch import Tensor

from qrlora.basis._linalg import mapped, orthonormal, svd, symmetric, times


def exact_block(matrix: Tensor, columns: int, *, leading: bool, fp64: bool) -> Tensor:
    """First or last columns `[d, columns]` of the thin `U` of `matrix [d, n]`, by full SVD."""
    u, _, _ = svd(matrix.double() if fp64 else matrix)
    return _end(u, columns, leading)


def gram_block(matrix: Tensor, columns: int, *, leading: bool, fp64: bool) -> Tensor:
    """The same by eigenvectors of the smaller Gram matrix, mapped through `matrix` if they are the other side's.

    In fp32 they are off by its rounding over the gaps between eigenvalues, which one step of refinement in fp64 removes
    where it is small.
    """
    d, n = matrix.shape
    m = matrix.double() if fp64 else matrix
    values, every = symmetric(m @ m.T if d <= n else m.T @ m)
    vectors = _end(torch.flip(every, (1,)), columns, leading)
    if leading and vectors.dtype != torch.float64 and columns < every.shape[1]:
        small = matrix if d <= n else matrix.T
        vectors = _refined(small, torch.flip(every, (1,)), torch.flip(values, (0,)), columns)
    return vectors if d <= n else mapped(m.to(vectors), vectors)


def _refined(small: Tensor, every: Tensor, values: Tensor, columns: int) -> Tensor:
    """The first `columns` of approximate eigenvectors `every [k, k]` of small small^T, better by one Newton step, fp64.

    `x_i += sum_j x_j (x_j^T r_i) / (l_i - l_j)` over the j past the block, with residuals r in fp64 (Ogita and Aishima
    2018, "Iterative refinement for symmetric eigenvalue decomposition"). Within the block Rayleigh-Ritz finds them.
    """
    first = orthonormal(every[:, :columns].double())
    images = times(small, times(small.T, first))
    found = (first * images).sum(dim=0)
    residuals = images - first * found
    rest = every[:, columns:]
    gaps = found - values[columns:, None].double()
    inside = gaps > 0.01 * (found[0] - values[-1]) / every.shape[1]  # the last columns are spare and have next to none
    steps = torch.where(inside, (rest.T @ residuals.to(rest)).double() / gaps, 0.0)
    return first + (rest @ steps.to(rest)).double()


def _end(vectors: Tensor, columns: int, leading: bool) -> Tensor:
    return vectors[:, :columns] if leading else vectors[:, vectors.shape[1] - columns :]
