"""Cosines, distances and the bootstrap, against float64 formulas and an exact distribution."""

from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.evaluation import bootstrap_mean, distance, hellinger, multiscale, nearest, similarity

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(2, 7), st.integers(0, 2**31))


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.booleans())
def test_similarity_is_the_mean_cosine(shape: tuple[int, int, int, int], centred: bool) -> None:
    count, references, width, seed = shape
    rows, others, centre = drawn(seed, count, width), drawn(seed + 1, references, width), drawn(seed + 2, width)
    off = centre.double().numpy() if centred else np.zeros(width)
    expected = [
        np.mean([cosine(row - off, other - off) for other in others.double().numpy()]) for row in rows.double().numpy()
    ]
    np.testing.assert_allclose(similarity(rows, others, centre if centred else None), expected, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.booleans())
def test_distance_and_nearest_follow_their_definitions(shape: tuple[int, int, int, int], centred: bool) -> None:
    count, _, width, seed = shape
    rows, others, centre = drawn(seed, count, width), drawn(seed + 1, count, width), drawn(seed + 2, width)
    off = centre.double().numpy() if centred else np.zeros(width)
    given_centre = centre if centred else None
    one, other = rows.double().numpy() - off, others.double().numpy() - off
    expected = [1 - cosine(a, b) for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(distance(rows, others, given_centre), expected, atol=1e-12)
    places = [int(np.argmax([cosine(a, b) for b in other])) for a in one]
    assert nearest(rows, others, given_centre).tolist() == places


@pytest.mark.parametrize(("ones", "count"), [(6, 20), (13, 17), (2, 30)])
def test_the_bootstrap_of_shares_is_binomial(ones: int, count: int) -> None:
    """Resampled zeros and ones have a binomial sum, whose quantiles are known exactly."""
    share = ones / count
    cumulative = np.cumsum([comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)])
    low, high = (int(np.searchsorted(cumulative, at)) / count for at in (0.025, 0.975))
    found = bootstrap_mean([1.0] * ones + [0.0] * (count - ones), resamples=20_000, seed=3)
    assert found.mean == pytest.approx(share)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_the_bootstrap_nears_the_normal_interval_and_repeats() -> None:
    values = np.random.default_rng(0).normal(2.0, 0.5, 400)
    found = bootstrap_mean(values.tolist(), seed=1)
    error = values.std() / 20
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert bootstrap_mean(values.tolist(), seed=1) == found
    assert bootstrap_mean(values.tolist(), seed=2) != found


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    found = bootstrap_mean([0.25])
    assert (found.mean, found.low, found.high) == (0.25, None, None)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])


def test_distances_of_black_and_white() -> None:
    black, white = np.zeros((1, 64, 64, 3), np.uint8), np.full((1, 64, 64, 3), 255, np.uint8)
    # Of nine histograms four agree: gradients, and the three of saturation.
    assert hellinger(black, white).item() == pytest.approx(np.sqrt(5 / 9), abs=1e-6)
    assert hellinger(white, white).item() == pytest.approx(0, abs=1e-3)
    one, other = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    assert multiscale(one, other).item() == pytest.approx(0.5), "colours differ by 1, gradients not at all"
    assert multiscale(other, other).item() == 0


def test_multiscale_of_a_column_of_light() -> None:
    """One column is lit: at each scale it is half as bright and twice as wide a part; down it there is no gradient."""
    dark, lit = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    lit[..., 0] = 1
    scales = [(16, 1), (8, 1 / 2), (4, 1 / 4), (2, 1 / 8)]
    expected = [(light / side + light / (side - 1) / 2) / 2 for side, light in scales]
    assert multiscale(dark, lit).item() == pytest.approx(np.mean(expected), abs=1e-6)
