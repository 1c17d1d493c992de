"""MiCA's basis: the minor singular vectors."""

from qrlora.basis._linalg import positive_peaks
from qrlora.basis._registry import BasisColumns, BasisRequest, register_basis
from qrlora.basis._subspace import trailing_subspace


@register_basis("minor", bands=True)
def minor(request: BasisRequest) -> BasisColumns:
    """The last r columns of the thin U (MiCA, in peft since 2026), each one's entry of largest magnitude positive."""
    found = trailing_subspace(
        request.matrix,
        request.rank * request.band.count,
        solver=request.solver,
        layer=request.layer,
        columns=request.band.columns(request.rank),
    )
    return BasisColumns(positive_peaks(found.vectors), found.solver, found.angle)
