"""QR-LoRA's basis."""

from qrlora.basis._linalg import positive_qr
from qrlora.basis._registry import BasisColumns, BasisRequest, register_basis
from qrlora.basis._subspace import leading_subspace


@register_basis("qr", bands=True)
def qr(request: BasisRequest) -> BasisColumns:
    """`Q` of `Q R = W_r`, the rank-r truncated SVD of W, with `diag(R) > 0` (QR-LoRA, the published initialisation).

    `W_r = P P^T W` for any orthonormal P of the leading subspace, so `Q = P Q'` with `Q' R' = P^T W`: a small QR
    instead of a full one, and independent of the P a solver found. Only the first r columns of W enter Q'; where
    their projection is singular, Q is still orthonormal and deterministic, but not unique. A band has the QR
    decomposition of its own slice `U_i S_i V_i^T` (Freq-MoE, in QR-LoRA's Stable Diffusion 3 fork).
    """
    rank, band = request.rank, request.band
    found = leading_subspace(
        request.matrix,
        rank * band.count,
        solver=request.solver,
        layer=request.layer,
        columns=band.columns(rank),
    )
    core = found.vectors.T @ request.matrix[:, :rank].double()
    return BasisColumns(found.vectors @ positive_qr(core), found.solver, found.angle)
