"""ICA against scikit-learn's FastICA from the same start, and what makes it the same on every run."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import FastICA

from qrlora.basis import _ica as module
from qrlora.basis import align, basis_seconds, fingerprint, is_orthonormal, make_basis, rank_limit
from qrlora.basis._ica import independent_components
from qrlora.errors import QrloraError, QrloraWarning
from tests.basis.weights import Array, power_law, tensor


def mixture(out: int = 300, inputs: int = 40, sources: int = 8, seed: int = 0, noise: float = 0.0) -> Array:
    """`[out, in]`: independent non-Gaussian sources over the rows, mixed with falling weights, a mean, and noise."""
    rng = np.random.default_rng(seed)
    kinds = [rng.laplace(size=out), rng.uniform(-1, 1, out), rng.choice([-1.0, 1.0], out), rng.exponential(size=out)]
    drawn = [kinds[i % 4] if i < 4 else rng.laplace(size=out) for i in range(sources)]
    found = np.stack(drawn, axis=1)
    found = (found - found.mean(0)) / found.std(0)
    mixing = rng.standard_normal((inputs, sources)) * np.arange(1, sources + 1) ** -0.7
    return found @ mixing.T + rng.standard_normal(inputs) + noise * rng.standard_normal((out, inputs))


def by_sklearn(weight: Array, rank: int) -> tuple[Array, Array, int]:
    """Sources `[out, r]` and mixing `[in, r]`, sorted, signed and balanced here, and how many iterations it took."""
    centred = weight - weight.mean(0)
    count = min(16 * rank, weight.shape[0] - 1, np.linalg.matrix_rank(centred))
    # scikit-learn whitens by the left singular vectors of the transpose, their first entries positive.
    axes = np.linalg.svd(centred.T, full_matrices=False)[0]
    axes = (axes * np.sign(axes[0]))[:, :count]
    gaussian = torch.randn(
        count, weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).numpy()
    model: Any = FastICA(
        count,
        whiten="unit-variance",
        fun="logcosh",
        max_iter=100,
        tol=1e-3,
        w_init=gaussian @ axes,
        whiten_solver="svd",
    )
    sources, mixing = model.fit_transform(weight), model.mixing_
    order = np.argsort(-(mixing**2).sum(0), kind="stable")[:rank]
    sources, mixing = sources[:, order], mixing[:, order]
    signs = np.sign(mixing[np.abs(mixing).argmax(0), np.arange(rank)])
    scale = np.sqrt(np.linalg.norm(mixing, axis=0) / np.linalg.norm(sources, axis=0))
    return sources * scale * signs, mixing / scale * signs, model.n_iter_


@pytest.mark.parametrize(
    ("shape", "sources", "rank", "noise"), [((300, 40), 8, 3, 0.0), ((60, 90), 24, 2, 0.0), ((900, 24), 16, 1, 1e-2)]
)
def test_components_are_scikit_learns_from_the_same_start(
    shape: tuple[int, int], sources: int, rank: int, noise: float
) -> None:
    weight = mixture(*shape, sources=sources, noise=noise)
    expected_sources, expected_mixing, iterations = by_sklearn(weight, rank)
    assert iterations < 100
    found = independent_components(tensor(weight, torch.float64), rank)
    np.testing.assert_allclose(found.sources.numpy(), expected_sources, atol=1e-8)
    np.testing.assert_allclose(found.mixing.numpy(), expected_mixing, atol=1e-8)
    for side, expected in (("output", expected_sources), ("input", expected_mixing)):
        basis = make_basis(tensor(weight), rank, "ica", side=side)  # pyright: ignore[reportArgumentType]
        assert (basis.solver, basis.vectors.dtype) == ("fastica", torch.float32)
        np.testing.assert_allclose(basis.vectors.numpy(), expected, atol=1e-3)
        assert basis.angle < 2.6


def test_independent_sources_are_found_again() -> None:
    """What was mixed comes out: each true source is one found source, up to sign."""
    rng = np.random.default_rng(1)
    true = np.stack([rng.laplace(size=4000), rng.uniform(-1, 1, 4000), rng.choice([-1.0, 1.0], 4000)], axis=1)
    weight = true @ rng.standard_normal((20, 3)).T
    found = independent_components(tensor(weight, torch.float64), 3).sources.numpy()
    correlation = np.abs(np.corrcoef(true.T, found.T)[:3, 3:])
    assert (correlation.max(axis=1) > 0.999).all()


@given(seed=st.integers(0, 50), rank=st.integers(1, 4))
@settings(max_examples=4, deadline=None, derandomize=True)
def test_order_signs_and_balance_are_canonical(seed: int, rank: int) -> None:
    weight = tensor(mixture(120, 12, 4, seed), torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QrloraWarning)  # a start may need more than 100 iterations
        found = independent_components(weight, rank)
    sources, mixing = found.sources.norm(dim=0), found.mixing.norm(dim=0)
    torch.testing.assert_close(sources, mixing)
    # At unit variance of the sources, energy of the mixing column is the product of the two norms.
    assert (torch.diff(sources * mixing) <= 1e-12).all()
    assert (found.mixing.gather(0, found.mixing.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(found.sources.mean(0), torch.zeros(rank, dtype=torch.float64), atol=1e-9, rtol=0)
    # Uncorrelated, and together with the mean they are part of the weight.
    gram = found.sources.T @ found.sources
    torch.testing.assert_close(gram, torch.diag(torch.diagonal(gram)), atol=1e-8, rtol=0)
    left = weight - weight.mean(0) - found.sources @ found.mixing.T
    assert float((found.sources.T @ left).abs().max()) < 1e-8


@pytest.mark.parametrize("side", ["output", "input"])
def test_the_same_on_every_run_whatever_is_seeded_around_it(side: Any) -> None:
    weight = tensor(mixture())
    first = make_basis(weight, 3, "ica", side=side)
    torch.manual_seed(123)
    np.random.default_rng(4)
    again = make_basis(weight.clone(), 3, "ica", side=side, seed=77, layer="another name")
    assert torch.equal(fingerprint(first.vectors), fingerprint(again.vectors))


@given(flips=st.lists(st.booleans(), min_size=40, max_size=40))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_signs_of_the_whitening_do_not_matter(flips: list[bool]) -> None:
    weight = tensor(mixture(), torch.float64)
    plain, real = independent_components(weight, 3), module.svd

    def flipped(matrix: torch.Tensor) -> Any:
        left, values, right = real(matrix)
        signs = torch.tensor([-1.0 if flip else 1.0 for flip in flips], dtype=torch.float64)
        return left * signs, values, right * signs[:, None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "svd", flipped)
        other = independent_components(weight, 3)
    torch.testing.assert_close(other.mixing, plain.mixing, rtol=0, atol=1e-9)


def test_no_convergence_is_a_warning_that_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ITERATIONS", 1)
    with pytest.warns(QrloraWarning, match=r"blocks\.3: FastICA did not converge in 1 iterations"):
        basis = make_basis(tensor(mixture()), 4, "ica", layer="blocks.3")
    assert basis.angle > 2.5
    assert bool(torch.isfinite(basis.vectors).all())


def test_ica_is_compared_column_by_column_not_by_span() -> None:
    vectors = make_basis(tensor(mixture()), 3, "ica").vectors
    assert (is_orthonormal("ica"), is_orthonormal("qr")) == (False, True)
    back, misfit = align(vectors, fingerprint(vectors), orthonormal=False)
    assert torch.equal(back, vectors)
    assert misfit < 1e-6
    turned = vectors.flip(1)
    assert align(turned, fingerprint(vectors), orthonormal=False)[1] > 0.1


def test_limits() -> None:
    assert rank_limit(torch.ones(12, 5), "ica") == rank_limit(torch.ones(12, 5), "ica", side="input") == 4
    for bad in (torch.zeros(20, 30), torch.ones(20, 30), tensor(mixture(40, 30, 2))):
        with pytest.raises(QrloraError, match=r"to_q: the centred weight has only \d+ principal components, fewer"):
            make_basis(bad, 3, "ica", layer="to_q")


def test_constant_columns_and_extreme_scales_are_fine() -> None:
    plain = mixture()
    expected = make_basis(tensor(plain, torch.float64), 2, "ica").vectors
    for scale in (1e-12, 1e12):
        vectors = make_basis(tensor(plain * scale, torch.float64), 2, "ica").vectors
        torch.testing.assert_close(vectors, expected * scale**0.5, rtol=1e-4, atol=0)


def test_the_estimate_grows_with_the_layers_and_only_ica_has_one() -> None:
    shapes = [(48, 32)] * 10
    assert basis_seconds("qr", shapes, 2) is None
    assert basis_seconds("ica", [], 2) == 0.0
    seconds = basis_seconds("ica", shapes, 2)
    assert seconds is not None
    assert seconds > 0
    once = module._operations((48, 32), 2)
    assert module._operations((96, 64), 2) > once > module.ITERATIONS * module._iteration_operations(48, 32) * 0.9


@pytest.mark.parametrize("out", [33, 200])
def test_whitening_is_capped_by_the_shape_and_the_numerical_rank(out: int) -> None:
    whitened = module._whiten(tensor(power_law(out, 50), torch.float64), 8, "x")
    assert whitened.data.shape == (min(128, out - 1, 50), out)
    covariance = whitened.data @ whitened.data.T / out
    torch.testing.assert_close(covariance, torch.eye(len(covariance), dtype=torch.float64), atol=1e-9, rtol=0)
    assert module._whiten(tensor(mixture(300, 40, 8), torch.float64), 8, "x").data.shape[0] == 8
