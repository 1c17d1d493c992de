"""SVD-LoRA's basis."""

from qrlora.basis._linalg import positive_peaks
from qrlora.basis._registry import BasisColumns, BasisRequest, register_basis
from qrlora.basis._subspace import leading_subspace


@register_basis("svd", bands=True)
def svd(request: BasisRequest) -> BasisColumns:
    """The leading singular vectors, by descending singular value, each one's entry of largest magnitude positive."""
    found = leading_subspace(
        request.matrix,
        request.rank * request.band.count,
        solver=request.solver,
        layer=request.layer,
        columns=request.band.columns(request.rank),
    )
    return BasisColumns(positive_peaks(found.vectors), found.solver, found.angle)
