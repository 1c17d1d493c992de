"""Orthonormal bases derived from a weight: pure tensor mathematics on torch alone."""

from qrlora.basis._identity import align, fingerprint, weight_hash
from qrlora.basis._linalg import as_matrix, principal_angle
from qrlora.basis._registry import (
    Basis,
    BasisColumns,
    BasisRequest,
    basis_names,
    make_basis,
    rank_limit,
    register_basis,
)
from qrlora.basis._subspace import ANGLE_TOLERANCE, Side, Solver, Subspace, leading_subspace, trailing_subspace
from qrlora.basis.bases import load_bases

load_bases()

__all__ = [
    "ANGLE_TOLERANCE",
    "Basis",
    "BasisColumns",
    "BasisRequest",
    "Side",
    "Solver",
    "Subspace",
    "align",
    "as_matrix",
    "basis_names",
    "fingerprint",
    "leading_subspace",
    "make_basis",
    "principal_angle",
    "rank_limit",
    "register_basis",
    "trailing_subspace",
    "weight_hash",
]
