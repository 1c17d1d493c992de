"""The iterative way to a block that holds the leading singular subspace. It only proposes: `_certificate` judges."""

import math

from torch import Tensor

from qrlora.basis._linalg import eigenvectors, gaussian, mapped, norms, orthonormal, quick_orthonormal

_SEED = 0
_SIZE = 12  # columns of the whole space, in ranks; beyond it the Gram matrix is cheaper
_FIRST_LOOK = 7  # likewise; slowly falling singular values need more, and each look costs a small decomposition
_STALLED = 0.7  # an estimate that falls less than to this share has met rounding


def krylov_block(rows: Tensor, columns: int, rank: int, turned: Tensor, angle: float) -> Tensor:
    """Leading Ritz vectors `[d, columns]` from a block Krylov space with full reorthogonalisation.

    The space grows block by block until its own estimate of the angle is good, until rounding stops it, or until it
    has 12 * rank columns; it gives up earlier where its progress says that this will not do. Blocks are little wider
    than the rank: for the same number of products a narrower one has a polynomial of higher degree. Musco and Musco
    2015, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition", algorithm
    2, seeded.

    Arguments:
        rows: the matrix `[d, n]`, in the dtype to compute in.
        columns: how many vectors are wanted.
        rank: how many of them must be right.
        turned: the transpose `[n, d]`; both contiguous on a CPU, where a transposed view halves the speed of products.
        angle: in degrees, the estimate at which the first `rank` are.
    """
    d, n = rows.shape
    small, back = (rows, turned) if d <= n else (turned, rows)
    side = small.shape[0]
    width = min(max(rank + rank // 8, columns // 2, 1), side)
    space = _Space(small, min(max(_SIZE * rank, columns), side))
    block = orthonormal(gaussian(side, width, _SEED).to(rows))
    before = math.inf
    while True:
        space.add(block, small @ (back @ block))
        if space.room == 0:
            break
        if space.filled >= max(_FIRST_LOOK * rank, columns):
            estimate = space.angle(rank)
            if estimate <= angle or (estimate < 1.0 and estimate > _STALLED * before):
                break
            steps = math.ceil(space.room / width)
            if before < math.inf and estimate * min(1.0, estimate / before) ** steps > 1.0:
                break  # at this pace the whole space would not bring it within reach of the certificate's power steps
            before = estimate
        block = space.following(width)
    vectors = space.ritz_vectors(columns)
    return vectors if d <= n else mapped(rows, vectors)


class _Space:
    """Orthonormal `K [k, size]`, filled block by block, and `A K`, `K^T A K`, where `A = small small^T`."""

    def __init__(self, small: Tensor, size: int) -> None:
        self._basis = small.new_empty(small.shape[0], size)
        self._images = small.new_empty(small.shape[0], size)
        self._projected = small.new_zeros(size, size)
        self._turn: Tensor | None = None
        self.filled = 0

    @property
    def room(self) -> int:
        return self._basis.shape[1] - self.filled

    def add(self, block: Tensor, image: Tensor) -> None:
        """Append orthonormal columns, which are at right angles to those there, and their images under A."""
        here = slice(self.filled, self.filled + block.shape[1])
        self.filled, self._turn = here.stop, None
        self._basis[:, here], self._images[:, here] = block, image
        overlap = self._basis[:, : here.stop].T @ image
        self._projected[: here.stop, here] = overlap
        self._projected[here, : here.stop] = overlap.T

    def following(self, width: int) -> Tensor:
        """The part of the last images outside the space, orthonormal, at most `width` wide and cut to the room."""
        known = self._basis[:, : self.filled]
        block = self._images[:, self.filled - width : self.filled][:, : self.room]
        for _ in range(2):  # one pass is not enough for a block that lies almost inside the known space
            block = quick_orthonormal(block - known @ (known.T @ block))
        return block

    def ritz_vectors(self, columns: int) -> Tensor:
        return self._basis[:, : self.filled] @ self._eigenvectors()[:, :columns]

    def angle(self, rank: int) -> float:
        """Estimate, in degrees and up to rounding, of the angle between the first `rank` Ritz vectors and the truth.

        For each, the norm of its residual over its distance from eigenvalue rank + 1 (Davis and Kahan 1970).
        """
        turn = self._eigenvectors()[:, : rank + 1]
        vectors, images = self._basis[:, : self.filled] @ turn, self._images[:, : self.filled] @ turn
        values = (vectors * images).sum(dim=0)
        gaps = (values[:rank] - values[rank]).clamp(min=1e-30 * float(values[0].abs()) + 1e-300)
        sines = norms(images - vectors * values)[:rank] / gaps
        return math.degrees(float(norms(sines)))

    def _eigenvectors(self) -> Tensor:
        if self._turn is None:
            known = self._projected[: self.filled, : self.filled]
            self._turn = eigenvectors((known + known.T) / 2)
        return self._turn
