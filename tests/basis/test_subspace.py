import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.basis import ANGLE_TOLERANCE, leading_subspace, trailing_subspace
from qrlora.basis import _subspace as module
from qrlora.basis._certificate import leading_angle, ritz
from qrlora.errors import QrloraError, QrloraWarning
from tests.basis.weights import degrees, off_orthonormal, power_law, reference, tensor, with_values

SOLVERS = ("exact", "gram", "krylov")
few = settings(max_examples=25, deadline=None, derandomize=True)


@given(
    d=st.integers(2, 24), n=st.integers(2, 24), seed=st.integers(0, 99), solver=st.sampled_from(SOLVERS), data=st.data()
)
@few
def test_any_shape_orthonormal_and_within_its_own_bound(d, n, seed, solver, data):
    rank = data.draw(st.integers(1, min(d, n)))
    side = data.draw(st.sampled_from(["output", "input"]))
    weight = torch.randn(d, n, generator=torch.Generator().manual_seed(seed))
    found = leading_subspace(weight, rank, side=side, solver=solver)
    u, s, _ = reference(weight, side)
    assert found.vectors.shape == (d if side == "output" else n, rank)
    assert off_orthonormal(found.vectors) < 1e-12
    assert degrees(found.vectors, u[:, :rank]) <= found.angle + 1e-9
    if found.angle < 0.1:
        np.testing.assert_allclose(found.values.numpy(), s[:rank], rtol=1e-5)


@given(
    d=st.integers(2, 24),
    n=st.integers(2, 24),
    seed=st.integers(0, 99),
    solver=st.sampled_from(["exact", "gram"]),
    data=st.data(),
)
@few
def test_trailing_any_shape_orthonormal_and_within_its_own_bound(d, n, seed, solver, data):
    rank = data.draw(st.integers(1, min(d, n)))
    side = data.draw(st.sampled_from(["output", "input"]))
    weight = torch.randn(d, n, generator=torch.Generator().manual_seed(seed))
    found = trailing_subspace(weight, rank, side=side, solver=solver)
    u, s, _ = reference(weight, side)
    assert off_orthonormal(found.vectors) < 1e-12
    assert degrees(found.vectors, u[:, u.shape[1] - rank :]) <= found.angle + 1e-9
    np.testing.assert_allclose(found.values.numpy(), s[len(s) - rank :], atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80)])
def test_leading_span_of_a_power_law(solver, side, shape):
    weight = tensor(power_law(*shape))
    found = leading_subspace(weight, 4, side=side, solver=solver)
    u, _, _ = reference(weight, side)
    assert found.solver == solver
    assert degrees(found.vectors, u[:, :4]) <= found.angle <= ANGLE_TOLERANCE


@pytest.mark.parametrize("solver", ["exact", "gram"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80)])
def test_trailing_span_of_a_power_law(solver, side, shape):
    weight = tensor(power_law(*shape))
    found = trailing_subspace(weight, 5, side=side, solver=solver)
    u, _, _ = reference(weight, side)
    assert degrees(found.vectors, u[:, -5:]) <= found.angle <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_weights_are_decomposed_in_at_least_fp32(dtype):
    weight = tensor(power_law(70, 50), dtype)
    found = leading_subspace(weight, 6)
    assert degrees(found.vectors, reference(weight)[0][:, :6]) <= found.angle <= ANGLE_TOLERANCE


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-33, 1e33])
def test_extreme_weights(solver, scale):
    plain = tensor(power_law(60, 40))
    weight = plain * scale
    found = leading_subspace(weight, 5, solver=solver)
    u, s, _ = reference(weight)
    assert degrees(found.vectors, u[:, :5]) < ANGLE_TOLERANCE
    np.testing.assert_allclose(found.values.numpy(), s[:5], rtol=1e-5)


def test_fp64_resolves_values_far_below_fp32_rounding():
    weight = tensor(with_values(40, 30, 10.0 ** -np.arange(30.0) * 1.0), torch.float64)
    found = leading_subspace(weight, 10, solver="exact", fp64=True)
    assert degrees(found.vectors, reference(weight)[0][:, :10]) <= found.angle <= ANGLE_TOLERANCE


@pytest.mark.parametrize(
    ("shape", "rank", "solver"),
    [((300, 512), 16, "exact"), ((520, 600), 8, "krylov"), ((600, 520), 40, "gram")],
)
def test_auto_picks_by_shape(shape, rank, solver):
    weight = tensor(power_law(*shape))
    found = leading_subspace(weight, rank)
    assert found.solver == solver
    assert degrees(found.vectors, reference(weight)[0][:, :rank]) <= found.angle <= ANGLE_TOLERANCE


def test_auto_does_not_keep_a_krylov_subspace_that_did_not_converge():
    weight = torch.randn(520, 520, generator=torch.Generator().manual_seed(3))  # flat spectrum
    u, _, _ = reference(weight)
    krylov = leading_subspace(weight, 8, solver="krylov")
    assert degrees(krylov.vectors, u[:, :8]) > 1.0
    assert krylov.angle > ANGLE_TOLERANCE
    found = leading_subspace(weight, 8)
    assert found.solver == "gram"
    assert degrees(found.vectors, u[:, :8]) <= found.angle <= ANGLE_TOLERANCE


@given(seed=st.integers(0, 99), size=st.floats(1e-9, 1e-2))
@few
def test_bound_covers_the_true_angle_of_a_disturbed_block(seed, size):
    rng = np.random.default_rng(seed)
    weight = power_law(40, 30, seed)
    u, _, _ = np.linalg.svd(weight)
    block = u[:, :10] + size * rng.standard_normal((40, 10))
    found = ritz(torch.from_numpy(weight), torch.from_numpy(block))
    true = degrees(found.vectors[:, :5], u[:, :5])
    assert true <= leading_angle(found, 5) <= max(1000 * true, 1e-6)


def tied(k: int, rank: int) -> np.ndarray:
    values = np.arange(1, k + 1, dtype=np.float64) ** -0.5
    values[rank] = values[rank - 1]
    return values


def test_no_gap_is_reported_as_90_degrees_and_exact_is_the_definition():
    # A diagonal weight: its tie survives rounding.
    weight = torch.diag(torch.from_numpy(tied(12, 4))).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = leading_subspace(weight, 4)
        last = trailing_subspace(torch.diag(torch.from_numpy(tied(12, 8))).float(), 4)
    assert (found.solver, found.angle, last.angle) == ("exact", 90.0, 90.0)
    assert off_orthonormal(found.vectors) < 1e-12
    assert off_orthonormal(last.vectors) < 1e-12


def test_no_gap_in_a_large_weight_falls_back_to_exact_and_says_so():
    weight = torch.diag(torch.from_numpy(tied(520, 4))).float()
    with pytest.warns(
        QrloraWarning, match=r"blocks\.7\.to_q: .*krylov is certain to 90 .*gram is certain to 90 .*exact"
    ):
        found = leading_subspace(weight, 4, layer="blocks.7.to_q")
    assert (found.solver, found.angle) == ("exact", 90.0)
    assert off_orthonormal(found.vectors) < 1e-12


def test_fallback_is_the_exact_subspace_never_what_failed(monkeypatch):
    weight = tensor(power_law(530, 520))

    def nonsense(matrix, columns, *args, **kwargs):
        return torch.eye(matrix.shape[0])[:, -columns:]

    def failing(matrix, columns, *args, **kwargs):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(module, "krylov_block", nonsense)
    monkeypatch.setattr(module, "gram_block", failing)
    with pytest.warns(QrloraWarning, match="krylov is certain to .* gram solver did not converge"):
        found = leading_subspace(weight, 8)
    assert found.solver == "exact"
    assert degrees(found.vectors, reference(weight)[0][:, :8]) <= found.angle <= ANGLE_TOLERANCE


def test_exact_that_does_not_converge_names_the_layer(monkeypatch):
    def failing(*args, **kwargs):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(module, "exact_block", failing)
    with pytest.raises(QrloraError, match="ff: the exact solver did not converge"):
        leading_subspace(torch.eye(4), 2, layer="ff")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("true_rank", [0, 3])
def test_zero_and_rank_deficient_weights_give_orthonormal_vectors_each_time_the_same(solver, true_rank):
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(30, true_rank, generator=g) @ torch.randn(true_rank, 20, generator=g)
    first = leading_subspace(weight, 6, solver=solver)
    again = leading_subspace(weight.clone(), 6, solver=solver)
    assert off_orthonormal(first.vectors) < 1e-12
    assert torch.equal(first.vectors, again.vectors)
    if true_rank:
        projected = first.vectors @ (first.vectors.T @ weight.double())
        torch.testing.assert_close(projected, weight.double(), rtol=0, atol=1e-5)
        assert leading_subspace(weight, true_rank, solver=solver).angle < 1e-3


def test_whole_space_has_no_error():
    assert leading_subspace(torch.eye(5), 5).angle == 0.0
    assert trailing_subspace(torch.eye(5), 5).angle == 0.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_result_every_time_and_no_trace_on_the_global_state(solver):
    weight = torch.nn.Parameter(tensor(power_law(60, 90)))
    kept = weight.detach().clone()
    before = torch.get_rng_state()
    first = leading_subspace(weight, 5, solver=solver)
    torch.manual_seed(123)
    second = leading_subspace(weight, 5, solver=solver)
    torch.manual_seed(0)
    torch.set_rng_state(before)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(weight, kept)
    assert not first.vectors.requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
def test_callers_autocast_and_matmul_precision_change_nothing(solver):
    weight = tensor(power_law(64, 80))
    plain = leading_subspace(weight, 5, solver=solver)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = leading_subspace(weight, 5, solver=solver)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.vectors, plain.vectors)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: leading_subspace(w, 5, layer="to_k"), r"to_k: rank 5 exceeds this layer's limit of 4"),
        (lambda w: trailing_subspace(w, 5, layer="to_k"), r"to_k: rank 5 exceeds this layer's limit of 4"),
        (lambda w: leading_subspace(w, 0), "rank must be at least 1"),
        (lambda w: leading_subspace(w, 2, solver="svd"), "solver 'svd' is not one of auto, exact, gram, krylov"),
        (lambda w: trailing_subspace(w, 2, solver="krylov"), "solver 'krylov' is not one of auto, exact, gram"),
        (lambda w: leading_subspace(w, 2, side="left"), "side 'left' is not one of output, input"),
        (lambda w: leading_subspace(w * float("nan"), 2, layer="to_v"), "to_v: the weight holds NaN or infinite"),
        (lambda w: trailing_subspace(w / 0, 2, layer="to_v"), "to_v: the weight holds NaN or infinite"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(QrloraError, match=message):
        call(torch.ones(4, 6))


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_precision_set_through_the_newer_switches_is_left_alone_too():
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"  # from here on torch.get_float32_matmul_precision() raises
    try:
        assert leading_subspace(torch.eye(6), 6).angle == 0.0
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before
