"""A control that knows nothing of the weight."""

from qrlora.basis._linalg import gaussian, positive_qr
from qrlora.basis._registry import BasisColumns, BasisRequest, register_basis


def _whole_side(d: int, n: int) -> int:
    return d


@register_basis("random", limit=_whole_side)
def random(request: BasisRequest) -> BasisColumns:
    """`Q` of a seeded Gaussian `[d, r]` with `diag(R) > 0`: uniform on the orthonormal frames (Mezzadri 2007).

    It depends on d, r and the seed alone, so equally wide layers share it unless each gets a seed of its own.
    """
    start = gaussian(request.matrix.shape[0], request.rank, request.seed)
    return BasisColumns(positive_qr(start), "random", 0.0)
