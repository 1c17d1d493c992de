"""The three ways to a block that holds the wanted singular subspace. They only propose: `_certificate` judges."""

import torch
from torch import Tensor

from qrlora.basis._linalg import eigenvectors, gaussian, orthonormal, svd

_KRYLOV_STEPS = 6
_KRYLOV_SEED = 0


def exact_block(matrix: Tensor, columns: int, *, leading: bool, fp64: bool) -> Tensor:
    """First or last columns `[d, columns]` of the thin `U` of `matrix [d, n]`, by full SVD."""
    u, _, _ = svd(matrix.double() if fp64 else matrix)
    return _end(u, columns, leading)


def gram_block(matrix: Tensor, columns: int, *, leading: bool, fp64: bool) -> Tensor:
    """The same by eigenvectors of the smaller Gram matrix, mapped through `matrix` if they are the other side's."""
    d, n = matrix.shape
    m = matrix.double() if fp64 else matrix
    vectors = _end(eigenvectors(m @ m.T if d <= n else m.T @ m), columns, leading)
    return vectors if d <= n else _mapped(m, vectors)


def krylov_block(matrix: Tensor, columns: int, rank: int, *, fp64: bool) -> Tensor:
    """Leading Ritz vectors `[d, columns]` from a block Krylov space with full reorthogonalisation.

    Block width 2 * rank, six blocks (or as much of them as fits the smaller side), seeded start. Musco and Musco
    2015, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition",
    algorithm 2.
    """
    d, n = matrix.shape
    m = matrix.double() if fp64 else matrix
    small = m if d <= n else m.T
    side = small.shape[0]
    width = min(max(2 * rank, columns), side)
    start = gaussian(side, width, _KRYLOV_SEED).to(device=m.device, dtype=m.dtype)
    space, images = _krylov_space(small, orthonormal(start), min(_KRYLOV_STEPS * width, side))
    projected = space.T @ images
    vectors = space @ eigenvectors((projected + projected.T) / 2)[:, :columns]
    return vectors if d <= n else _mapped(m, vectors)


def _krylov_space(small: Tensor, start: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Orthonormal `K [k, size]` of the blocks `A^i start`, A = small small^T, the last one cut to fit; and `A K`."""
    space = start.new_empty(start.shape[0], size)
    images = torch.empty_like(space)
    block, filled = start, 0
    while True:
        here = slice(filled, filled + block.shape[1])
        space[:, here] = block
        images[:, here] = small @ (small.T @ block)
        filled = here.stop
        if filled == size:
            return space, images
        known = space[:, :filled]
        block = images[:, here][:, : size - filled]
        for _ in range(2):  # one pass is not enough for a block that lies almost inside the known space
            block = orthonormal(block - known @ (known.T @ block))


def _mapped(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Right singular vectors `[n, b]` to left ones `[d, b]`."""
    return orthonormal(matrix @ vectors)


def _end(vectors: Tensor, columns: int, leading: bool) -> Tensor:
    return vectors[:, :columns] if leading else vectors[:, vectors.shape[1] - columns :]
