import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.basis import (
    BasisColumns,
    _registry,
    _solvers,
    as_matrix,
    basis_names,
    is_orthonormal,
    leading_subspace,
    make_basis,
    principal_angle,
    rank_limit,
    register_basis,
)
from qrlora.errors import QrloraError
from tests.basis.weights import degrees, off_orthonormal, power_law, reference, tensor

DECOMPOSED = ("qr", "svd", "minor")
ORTHONORMAL = [name for name in basis_names() if is_orthonormal(name)]  # ica has tests of its own
few = settings(max_examples=25, deadline=None, derandomize=True)


def dense_qr(weight: torch.Tensor, rank: int, side: str) -> np.ndarray:
    """The published definition in float64: first r columns of Q of the full rank-r truncation, diag(R) > 0."""
    u, s, vh = reference(weight, side)
    q, r = np.linalg.qr((u[:, :rank] * s[:rank]) @ vh[:rank])
    return q[:, :rank] * np.sign(np.diag(r)[:rank])


@given(
    d=st.integers(2, 20),
    n=st.integers(2, 20),
    seed=st.integers(0, 99),
    side=st.sampled_from(["output", "input"]),
    data=st.data(),
)
@few
def test_qr_is_the_first_factor_of_the_full_qr_of_the_truncation(d, n, seed, side, data):
    rank = data.draw(st.integers(1, min(d, n)))
    weight = tensor(power_law(d, n, seed), torch.float64)
    basis = make_basis(weight, rank, side=side)
    u, s, vh = reference(weight, side)
    truncated = (u[:, :rank] * s[:rank]) @ vh[:rank]
    r = basis.vectors.double().numpy().T @ truncated
    # R = Q^T W_r: upper triangular, positive diagonal; that and Q's span define Q.
    assert np.abs(np.tril(r, -1)).max() < 1e-6
    assert (np.diag(r) > -1e-6).all()
    if np.abs(np.diag(r)).min() > 1e-3:
        np.testing.assert_allclose(basis.vectors.numpy(), dense_qr(weight, rank, side), atol=1e-6)


@pytest.mark.parametrize("solver", ["exact", "gram", "krylov"])
def test_every_solver_gives_the_same_q(solver):
    weight = tensor(power_law(90, 120))
    basis = make_basis(weight, 6, solver=solver)
    np.testing.assert_allclose(basis.vectors.numpy(), dense_qr(weight, 6, "output"), atol=1e-4)


@pytest.mark.parametrize("side", ["output", "input"])
def test_svd_and_minor_are_singular_vectors_with_their_peaks_positive(side):
    weight = tensor(power_law(30, 24))
    u, _, _ = reference(weight, side)
    peaks = u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])]
    expected = u * np.sign(peaks)
    np.testing.assert_allclose(make_basis(weight, 5, "svd", side=side).vectors.numpy(), expected[:, :5], atol=1e-6)
    np.testing.assert_allclose(make_basis(weight, 5, "minor", side=side).vectors.numpy(), expected[:, -5:], atol=1e-5)


@given(flips=st.lists(st.booleans(), min_size=24, max_size=24), name=st.sampled_from(DECOMPOSED))
@few
def test_signs_do_not_depend_on_those_the_svd_returns(flips, name):
    weight = tensor(power_law(30, 24))
    plain = make_basis(weight, 6, name)
    svd = _solvers.svd

    def flipped(matrix):
        u, s, vh = svd(matrix)
        signs = torch.tensor([-1.0 if x else 1.0 for x in flips], dtype=u.dtype)
        return u * signs, s, vh * signs[:, None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_solvers, "svd", flipped)
        other = make_basis(weight, 6, name)
    torch.testing.assert_close(other.vectors, plain.vectors, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ORTHONORMAL)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (12, 3, 3, 3)])
def test_every_basis_is_orthonormal_fp32_and_repeatable(name, side, dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    basis = make_basis(weight, 4, name, side=side)
    out, inputs = shape[0], int(np.prod(shape[1:]))
    assert basis.vectors.shape == (out if side == "output" else inputs, 4)
    assert basis.vectors.dtype == torch.float32
    assert off_orthonormal(basis.vectors) < 1e-6
    assert (basis.name, basis.side) == (name, side)
    assert 0 <= basis.angle <= 0.01
    assert torch.equal(basis.vectors, make_basis(weight, 4, name, side=side).vectors)


def test_conv_weights_flatten_and_input_is_the_transpose():
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    flat = weight.reshape(8, 27)
    assert torch.equal(as_matrix(weight), flat)
    assert torch.equal(make_basis(weight, 3).vectors, make_basis(flat, 3).vectors)
    assert torch.equal(make_basis(weight, 3, side="input").vectors, make_basis(flat.T, 3).vectors)


def test_basis_span_is_the_leading_span_of_a_larger_layer():
    weight = tensor(power_law(600, 530), torch.bfloat16)
    basis = make_basis(weight, 8, layer="x")
    assert basis.solver == "krylov"
    assert degrees(basis.vectors, reference(weight)[0][:, :8]) <= basis.angle < 0.011


def test_qr_of_a_weight_whose_first_inputs_are_dead_is_still_orthonormal_and_repeatable():
    weight = tensor(power_law(20, 16))
    weight[:, :4] = 0
    basis = make_basis(weight, 5)
    assert off_orthonormal(basis.vectors) < 1e-6
    assert torch.equal(basis.vectors, make_basis(weight, 5).vectors)
    assert degrees(basis.vectors, reference(weight)[0][:, :5]) < 0.01


@pytest.mark.parametrize("name", DECOMPOSED)
def test_zero_weight_has_a_basis(name):
    assert off_orthonormal(make_basis(torch.zeros(9, 7), 4, name).vectors) < 1e-6


def test_random_depends_on_the_seed_alone_and_reaches_the_whole_side():
    weight = tensor(power_law(12, 5))
    basis = make_basis(weight, 12, "random", seed=1)
    assert off_orthonormal(basis.vectors) < 1e-6
    assert torch.equal(basis.vectors, make_basis(weight * 2, 12, "random", seed=1).vectors)
    assert not torch.equal(basis.vectors, make_basis(weight, 12, "random", seed=2).vectors)
    g = torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
    r = basis.vectors.double().numpy().T @ g
    assert np.abs(np.tril(r, -1)).max() < 1e-5
    assert (np.diag(r) > 0).all()


def test_decomposed_bases_ignore_the_seed():
    weight = tensor(power_law(30, 40))
    for name in DECOMPOSED:
        assert torch.equal(make_basis(weight, 3, name, seed=1).vectors, make_basis(weight, 3, name, seed=2).vectors)


def test_rank_limits():
    weight = torch.ones(12, 5)
    assert {name: rank_limit(weight, name) for name in ("minor", "qr", "random", "svd")} == {
        "minor": 5,
        "qr": 5,
        "random": 12,
        "svd": 5,
    }
    assert rank_limit(weight, "random", side="input") == 5
    assert rank_limit(torch.ones(12, 2, 3, 3), "qr") == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_basis(torch.ones(4, 6), 5, layer="to_q"), "to_q: rank 5 exceeds this layer's limit of 4"),
        (lambda: make_basis(torch.ones(4, 6), 5, "random", layer="to_q"), "to_q: rank 5 exceeds .* limit of 4"),
        (lambda: make_basis(torch.ones(4, 6), 2, "svdd"), "no basis 'svdd', only ica, minor, qr, random, svd; did you"),
        (lambda: make_basis(torch.full((4, 6), torch.inf), 2, layer="to_q"), "to_q: .* NaN or infinite"),
        (lambda: make_basis(torch.ones(4), 1, layer="norm"), r"norm: a weight of shape \(4,\) is neither"),
        (lambda: make_basis(torch.ones(4, 4, dtype=torch.uint8), 1, layer="q4"), "q4: .* torch.uint8 looks packed"),
        (lambda: make_basis(torch.ones(4, 4, device="meta"), 1, layer="a"), "a: .* meta device"),
        (lambda: make_basis(torch.ones(0, 4), 1, layer="a"), r"a: .* \(0, 4\) is empty"),
        (lambda: as_matrix(torch.ones(4, 2, 3, 3), 2, "conv"), "conv: .* groups=2 .* cannot be adapted"),
        (lambda: rank_limit(torch.ones(4, 4), "qr", side="left"), "side 'left' is not one of"),
        (lambda: register_basis("qr")(lambda request: None), "'qr' is registered already"),
        (lambda: principal_angle(torch.ones(4, 2), torch.ones(4, 3)), "one shape"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(QrloraError, match=message):
        call()


def test_a_new_basis_is_one_registered_function(monkeypatch):
    monkeypatch.setattr(_registry, "_registry", dict(_registry._registry))

    @register_basis("first", limit=lambda d, n: 2)
    def first(request):
        return BasisColumns(torch.eye(request.matrix.shape[0], dtype=torch.float64)[:, : request.rank], "first", 0.0)

    assert "first" in basis_names()
    assert rank_limit(torch.ones(5, 5), "first") == 2
    assert torch.equal(make_basis(torch.ones(5, 3), 2, "first").vectors, torch.eye(5)[:, :2])


def test_principal_angle_keeps_the_digits_of_small_angles():
    for expected in (1e-9, 1e-4, 1.0, 45.0, 90.0):
        t = np.radians(expected)
        a = torch.eye(6, 2, dtype=torch.float64)
        b = a.clone()
        b[:, 1] = torch.tensor([0, np.cos(t), np.sin(t), 0, 0, 0], dtype=torch.float64)
        assert principal_angle(a, b @ torch.tensor([[2.0, 1.0], [0.0, 1.0]]).double()) == pytest.approx(
            expected, rel=1e-6
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_agree():
    weight = tensor(power_law(700, 600))
    for name in ORTHONORMAL:
        cpu, cuda = make_basis(weight, 8, name), make_basis(weight.cuda(), 8, name)
        assert cuda.vectors.is_cuda
        assert degrees(cpu.vectors, cuda.vectors.cpu()) < 0.01
    assert leading_subspace(weight.cuda(), 8).vectors.is_cuda
