import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.basis import align, fingerprint, make_basis, weight_hash
from qrlora.errors import QrloraError
from tests.basis.weights import power_law, tensor

few = settings(max_examples=25, deadline=None, derandomize=True)


def frame(d: int, r: int, seed: int) -> torch.Tensor:
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, r)))[0]
    return torch.from_numpy(q)


@given(r=st.integers(1, 16), extra=st.integers(1, 40), seed=st.integers(0, 99))
@few
def test_a_rotation_within_the_span_is_undone(r, extra, seed):
    q = frame(r + extra, r, seed)
    rotated = q @ frame(r, r, seed + 100)
    back, misfit = align(rotated, fingerprint(q))
    assert misfit < 1e-10
    torch.testing.assert_close(back, q, rtol=0, atol=1e-7)


def test_round_trip_in_fp32_between_two_solvers():
    weight = tensor(power_law(300, 200))
    stored, recomputed = make_basis(weight, 16, solver="exact"), make_basis(weight, 16, "svd", solver="krylov")
    back, misfit = align(recomputed.vectors, fingerprint(stored.vectors))
    assert back.dtype == torch.float32
    assert misfit < 1e-4
    torch.testing.assert_close(back, stored.vectors, rtol=0, atol=1e-3)


@given(r=st.integers(4, 16), extra=st.integers(4, 40), seed=st.integers(0, 99))
@few
def test_another_span_is_told_apart(r, extra, seed):
    q, other = frame(r + extra, r, seed), frame(r + extra, r, seed + 100)
    assert align(other, fingerprint(q))[1] > 1e-2


@given(seed=st.integers(0, 99))
@few
def test_a_span_turned_by_a_degree_is_told_apart(seed):
    both = frame(80, 16, seed)
    q = both[:, :8]
    turned = np.cos(np.radians(1.0)) * q + np.sin(np.radians(1.0)) * both[:, 8:]
    assert align(turned, fingerprint(q))[1] > 1e-3


def test_fingerprint_is_the_scaled_gaussian_sketch():
    q = frame(20, 4, 0)
    g = torch.randn(20, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    torch.testing.assert_close(fingerprint(q, seed=7), g.T @ q / 2, rtol=1e-12, atol=1e-12)
    assert align(q, fingerprint(q, seed=7), seed=8)[1] > 1e-2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(3, 3), r"\(3, 3\) does not fit"),
        (torch.zeros(4, 4), "zero"),
        (torch.full((4, 4), torch.nan), "finite"),
    ],
)
def test_a_damaged_fingerprint_is_refused(bad, message):
    with pytest.raises(QrloraError, match=message):
        align(frame(10, 4, 0), bad)


def test_hash_of_a_small_weight_is_sha256_of_shape_dtype_and_bytes():
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    expected = hashlib.sha256(b"(2, 3) torch.float32 " + np.arange(6, dtype="<f4").tobytes()).hexdigest()[:32]
    assert weight_hash(weight) == expected
    assert weight_hash(torch.nn.Parameter(weight.T.contiguous().T)) == expected


@pytest.mark.parametrize("shape", [(6, 10), (300, 400)])
def test_hash_changes_with_shape_dtype_and_values(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    others = [
        weight.reshape(shape[1], shape[0]),
        weight.half(),
        weight.bfloat16(),
        weight * (1 + 1e-6),
        weight + 1e-5 * torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        weight.flip(0),
        weight.flip(1),
    ]
    hashes = {weight_hash(x) for x in [weight, *others]}
    assert len(hashes) == 1 + len(others)
    assert all(len(x) == 32 for x in hashes)
    assert weight_hash(weight.clone()) == weight_hash(weight)


def test_hash_of_a_large_weight_sees_every_row_and_column():
    weight = torch.zeros(512, 768)
    plain = weight_hash(weight)
    for index in range(0, 512, 37):
        row = weight.clone()
        row[index] = 1
        assert weight_hash(row) != plain
    for index in range(0, 768, 53):
        column = weight.clone()
        column[:, index] = 1
        assert weight_hash(column) != plain


def test_hash_of_a_meta_weight_is_refused():
    with pytest.raises(QrloraError, match="meta"):
        weight_hash(torch.ones(2, 2, device="meta"))
