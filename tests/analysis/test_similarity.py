"""Similarities against their definitions, by numpy, and their random expectations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qrlora.analysis import bin_count, cosine, linear_cka, mutual_information


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(noise(size, size, seed=seed))[0]


def test_cosine_is_numpys() -> None:
    x, y = noise(7, 5), noise(7, 5, seed=1)
    expected = np.vdot(x.numpy(), y.numpy()) / (np.linalg.norm(x.numpy()) * np.linalg.norm(y.numpy()))
    assert cosine(x, y) == pytest.approx(expected, rel=1e-12)
    assert cosine(x, -2 * x) == pytest.approx(-1, rel=1e-12)
    assert cosine(x, torch.zeros(7, 5)) is None


def test_linear_cka_is_that_of_the_centred_gram_matrices() -> None:
    x, y = noise(20, 3).numpy(), noise(20, 5, seed=1).numpy()
    centre = np.eye(20) - 1 / 20
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = np.sum(k * m) / (np.linalg.norm(k) * np.linalg.norm(m))
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-10)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_linear_cka_does_not_see_rotations_and_scales(seed: int, scale: float) -> None:
    x = noise(30, 4, seed=seed)
    assert linear_cka(x, scale * x @ rotation(4, seed)) == pytest.approx(1, rel=1e-9)
    assert linear_cka(x, torch.ones(30, 4)) is None


def test_mutual_information_is_that_of_the_histogram() -> None:
    x, y = noise(400), noise(400, seed=1) + noise(400)
    bins = bin_count(400)
    assert bins == 7  # isqrt(400 / 8)

    def places(values: Tensor) -> np.ndarray:
        """Which of `bins` runs of the sorted values an entry is in."""
        ranks = values.numpy().argsort().argsort()
        starts = np.arange(1, bins) * 400 // bins
        return np.searchsorted(starts, ranks, side="right")

    joint = np.zeros((bins, bins))
    np.add.at(joint, (places(x), places(y)), 1 / 400)
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    entropies = [-sum(p * math.log(p) for p in side if p) for side in (rows, columns)]
    information = sum(
        joint[i, j] * math.log(joint[i, j] / (rows[i] * columns[j]))
        for i in range(bins)
        for j in range(bins)
        if joint[i, j]
    )
    expected = information / math.sqrt(entropies[0] * entropies[1])
    assert mutual_information(x, y) == pytest.approx(expected, rel=1e-9)


def test_mutual_information_sees_any_dependence_and_no_scale() -> None:
    x = noise(40, 50)
    assert mutual_information(x, x) == pytest.approx(1, abs=1e-12)
    assert mutual_information(x, (3 * x).exp()) == pytest.approx(1, abs=1e-12)
    heavy = x**3
    assert mutual_information(x, noise(40, 50, seed=1)) == pytest.approx(
        mutual_information(heavy, noise(40, 50, seed=1)), rel=1e-9
    )
    blind, seen = cosine(x, x**2), mutual_information(x, x**2)
    assert blind is not None
    assert seen is not None
    assert abs(blind) < 0.1 < 0.4 < seen
    assert mutual_information(x, torch.zeros(40, 50)) is None


def test_bins() -> None:
    assert [bin_count(values) for values in (1, 32, 512, 8192, 10**6)] == [2, 2, 8, 32, 32]


class TestIndependentMatrices:
    """Means over seeds against what theory expects."""

    def test_cosine_has_deviation_of_one_over_root_n(self) -> None:
        found = [cosine(noise(8, 16, seed=seed), noise(8, 16, seed=10_000 + seed)) or 0 for seed in range(600)]
        assert np.mean(found) == pytest.approx(0, abs=4 / math.sqrt(600 * 128))
        assert np.std(found) == pytest.approx(1 / math.sqrt(128), rel=0.12)

    @pytest.mark.parametrize(("channels", "p", "q"), [(64, 4, 4), (40, 6, 2)])
    def test_linear_cka_is_not_zero(self, channels: int, p: int, q: int) -> None:
        found = [
            linear_cka(noise(channels, p, seed=seed), noise(channels, q, seed=10_000 + seed)) or 0
            for seed in range(300)
        ]
        assert np.mean(found) == pytest.approx(math.sqrt(p * q / ((channels + p) * (channels + q))), rel=0.06)

    @pytest.mark.parametrize("size", [512, 2048])
    def test_mutual_information_is_not_zero(self, size: int) -> None:
        found = [mutual_information(noise(size, seed=seed), noise(size, seed=10_000 + seed)) or 0 for seed in range(80)]
        bins = bin_count(size)
        assert np.mean(found) == pytest.approx((bins - 1) ** 2 / (2 * size * math.log(bins)), rel=0.08)
