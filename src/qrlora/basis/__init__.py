"""Bases derived from a weight: pure tensor mathematics on torch alone."""

from qrlora.basis._bands import qr_bands
from qrlora.basis._identity import align, fingerprint, weight_hash
from qrlora.basis._linalg import as_matrix, principal_angle
from qrlora.basis._pairs import make_pair, pair_basis, pair_names, register_pair
from qrlora.basis._registry import (
    Band,
    Basis,
    BasisColumns,
    BasisRequest,
    basis_names,
    basis_seconds,
    has_bands,
    is_orthonormal,
    make_basis,
    rank_limit,
    register_basis,
)
from qrlora.basis._subspace import ANGLE_TOLERANCE, Side, Solver, Subspace, leading_subspace, trailing_subspace
from qrlora.basis.bases import load_bases

load_bases()

__all__ = [
    "ANGLE_TOLERANCE",
    "Band",
    "Basis",
    "BasisColumns",
    "BasisRequest",
    "Side",
    "Solver",
    "Subspace",
    "align",
    "as_matrix",
    "basis_names",
    "basis_seconds",
    "fingerprint",
    "has_bands",
    "is_orthonormal",
    "leading_subspace",
    "make_basis",
    "make_pair",
    "pair_basis",
    "pair_names",
    "principal_angle",
    "qr_bands",
    "rank_limit",
    "register_basis",
    "register_pair",
    "trailing_subspace",
    "weight_hash",
]
