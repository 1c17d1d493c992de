"""Bands of a basis, and the pairs of factors, against float64 decompositions."""

import pytest
import torch

from qrlora.basis import Band, make_basis, make_pair, pair_basis, pair_names, principal_angle, rank_limit, register_pair
from qrlora.errors import QrloraError
from tests.basis.weights import power_law, tensor

LAYERS = {"tall": (40, 24), "wide": (24, 40)}


def _weight(shape: str) -> torch.Tensor:
    return tensor(power_law(*LAYERS[shape]))


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("basis", ["qr", "svd", "minor"])
def test_a_band_is_its_slice_of_singular_vectors(basis: str, shape: str, side: str) -> None:
    weight = _weight(shape)
    matrix = (weight if side == "output" else weight.T).double()
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    first = 24 - 3 * 4 if basis == "minor" else 0
    found = [make_basis(weight, 4, basis, side=side, band=Band(index, 3)) for index in range(3)]  # pyright: ignore[reportArgumentType]
    for index, band in enumerate(found):
        part = slice(first + 4 * index, first + 4 * (index + 1))
        assert principal_angle(band.vectors, U[:, part].float()) < band.angle + 1e-4
        assert band.angle < 0.01
        if basis == "qr":
            Q, R = torch.linalg.qr(U[:, part] @ torch.diag(S[part]) @ Vh[part])
            Q = Q[:, :4] * R.diagonal()[:4].sign()
            assert float((band.vectors - Q).abs().max()) < 1e-4
    together = torch.cat([band.vectors for band in found], dim=1).double()
    assert float((together.T @ together - torch.eye(12)).abs().max()) < 1e-6


def test_limits_and_refusals() -> None:
    weight = _weight("tall")
    assert rank_limit(weight, "qr", bands=3) == 8
    with pytest.raises(QrloraError, match="limit of 8"):
        make_basis(weight, 9, "qr", band=Band(0, 3))
    with pytest.raises(QrloraError, match="cannot be cut into bands"):
        make_basis(weight, 4, "random", band=Band(0, 2))
    whole = make_basis(weight, 4, "qr", band=Band())
    assert torch.equal(whole.vectors, make_basis(weight, 4, "qr").vectors)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("shape", LAYERS)
def test_pairs(shape: str, side: str) -> None:
    weight = _weight(shape)
    W = weight.double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    truncated = U[:, :5] @ torch.diag(S[:5]) @ Vh[:5]
    for name in ("svd", "qr", "pissa"):
        basis = pair_basis(name)
        assert basis == ("svd" if name == "pissa" else name)
        vectors = make_basis(weight, 5, basis, side=side).vectors  # pyright: ignore[reportArgumentType]
        left, right = make_pair(weight, 5, name, vectors=vectors, side=side)  # pyright: ignore[reportArgumentType]
        assert float((left.double() @ right.double() - truncated).norm()) < 1e-5 * float(S.norm())
        if name == "pissa":
            assert float((left.norm(dim=0) - right.norm(dim=1)).abs().max()) < 1e-4
        else:
            own = left if side == "output" else right.T
            assert torch.equal(own, vectors)
    left, right = make_pair(weight, 5, "olora")
    Q, R = torch.linalg.qr(W)
    assert float((left.double() @ right.double() - Q[:, :5] @ R[:5]).abs().max()) < 1e-5
    vectors = make_basis(weight, 5, "random", side=side, seed=2).vectors  # pyright: ignore[reportArgumentType]
    left, right = make_pair(weight, 5, "random", vectors=vectors, side=side, seed=2)  # pyright: ignore[reportArgumentType]
    assert (left.shape, right.shape) == ((weight.shape[0], 5), (5, weight.shape[1]))
    for frame in (left, right.T):
        assert float((frame.T @ frame - torch.eye(5)).abs().max()) < 1e-5


def test_names() -> None:
    assert pair_names() == ("olora", "pissa", "random")
    with pytest.raises(QrloraError, match="registered already"):
        register_pair("pissa", basis=None)(lambda request: (request.matrix, request.matrix))
