"""Scores and intervals against values worked out elsewhere."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.fusion.plots import outer
from benchmarks.fusion.report import score_table
from benchmarks.fusion.scores import Scorer, make_scorer
from benchmarks.fusion.splits import Splits
from benchmarks.fusion.statistics import bootstrap, difference, geometric
from qrlora.evaluation import hellinger, multiscale
from tools.emoji.dataset import Emoji


def test_the_interval_is_that_of_all_resamples_of_few_pairs() -> None:
    values = np.array([0.0, 1.0, 5.0, 6.0])
    means = [np.mean(each) for each in itertools.product(values, repeat=4)]
    found = bootstrap(values, resamples=200_000)
    assert found.value == 3.0
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)


def test_the_interval_is_scipys() -> None:
    values = np.random.default_rng(1).normal(size=40)
    found = bootstrap(values)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.01)


def test_a_difference_on_the_same_pairs_is_the_interval_of_the_differences() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=30)
    other = one + 0.1 + 0.01 * random.normal(size=30)
    paired, alone = difference(one, other), bootstrap(one - other)
    assert (paired.value, paired.low, paired.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert paired.high < 0
    with pytest.raises(ValueError, match="not the same pairs"):
        difference(one, other[:3])
    with pytest.raises(ValueError, match="no pairs"):
        bootstrap(np.zeros(0))


def test_whole_groups_are_drawn_again() -> None:
    values, groups = np.array([0.0, 2.0, 4.0, 1.0, 9.0, 2.0]), ["a", "b", "c", "a", "b", "c"]
    of_groups = {"a": [0.0, 1.0], "b": [2.0, 9.0], "c": [4.0, 2.0]}
    means = [np.mean([of_groups[g] for g in drawn]) for drawn in itertools.product("abc", repeat=3)]
    found = bootstrap(values, resamples=200_000, groups=groups)
    assert found.value == 3.0
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975], method="inverted_cdf")))
    with pytest.raises(ValueError, match="not of one size"):
        bootstrap(values, groups=["a", "a", "a", "b", "b", "c"])
    with pytest.raises(ValueError, match="3 groups are told of 6 pairs"):
        bootstrap(values, groups=["a", "b", "c"])


def test_the_geometric_mean_is_of_the_shares() -> None:
    hits = np.array([[1, 0], [1, 1], [0, 0], [1, 0]], float)
    assert geometric(hits) == pytest.approx((0.75 * 0.25) ** 0.5)
    assert bootstrap(hits, geometric).value == pytest.approx((0.75 * 0.25) ** 0.5)


def test_the_pixel_distance_is_its_formula() -> None:
    random = np.random.default_rng(0)
    one, other = random.random((2, 3, 3, 16, 16))
    total = np.zeros(3)
    a, b = one, other
    for scale in range(4):
        if scale:
            a, b = (x.reshape(3, 3, x.shape[2] // 2, 2, -1, 2).mean(axis=(3, 5)) for x in (a, b))
        colours = np.abs(a - b).mean(axis=(1, 2, 3))
        down, across = (np.abs(np.diff(a, axis=k) - np.diff(b, axis=k)).mean(axis=(1, 2, 3)) for k in (2, 3))
        total += (colours + (down + across) / 2) / 2
    found = multiscale(torch.from_numpy(one).float(), torch.from_numpy(other).float())
    assert found.numpy() == pytest.approx(total / 4, rel=1e-5)


def test_the_look_distance_is_zero_for_equal_and_nearly_one_for_unlike_pictures() -> None:
    white, black = np.full((1, 64, 64, 3), 255, np.uint8), np.zeros((1, 64, 64, 3), np.uint8)
    half = white.copy()
    half[:, :32] = 0
    assert float(hellinger(white, white)) == pytest.approx(0, abs=1e-3)
    # gradient and saturation histograms of the two plain pictures agree, the six of colour and light do not
    assert float(hellinger(white, black)) > 0.7
    assert 0 < float(hellinger(white, half)) < float(hellinger(white, black))


def test_scores_of_true_and_of_wrong_pictures(scorer: Scorer, emoji: Emoji) -> None:
    pairs = [(content, style) for content in emoji.dev_contents for style in ("fluent-3d", "openmoji")]
    true = scorer(emoji.pictures(pairs), pairs)
    assert set(true["content"]) == set(true["style"]) == set(true["both"]) == {1.0}
    assert max(true["feature"]) == pytest.approx(0, abs=1e-5)
    assert max(true["pixels"]) == 0
    plain = emoji.pictures([(content, "noto") for content, _ in pairs])
    copied = scorer(plain, pairs)
    assert set(copied["style"]) == {0.0}
    assert set(copied["both"]) == {0.0}
    assert min(copied["look"]) > 0.1
    rows, means = scorer.judge.features(plain), scorer.judge.means
    centred = [(rows[i] - means[s], scorer.judge.rows[c, s] - means[s]) for i, (c, s) in enumerate(pairs)]
    expected = [1 - float(a @ b / a.norm() / b.norm()) for a, b in centred]
    assert copied["feature"] == pytest.approx(expected, abs=1e-5)


def test_a_scorer_is_made_once_and_scores_all_that_is_judged(
    emoji: Emoji, splits: Splits, scorer: Scorer, tmp_path: Path
) -> None:
    judged = [*emoji.dev_contents, *splits.shown]
    calls: list[int] = []

    def through(pictures: np.ndarray) -> np.ndarray:
        calls.append(len(pictures))
        return pictures

    look = scorer.judge.features
    first = make_scorer(emoji, look, judged, emoji.dev_contents, through, tmp_path)
    learned = len(calls)
    again = make_scorer(emoji, look, judged, emoji.dev_contents, through, tmp_path)
    assert len(calls) == learned + 1  # the true pictures alone
    pairs = [(splits.shown[0], "openmoji"), (emoji.dev_contents[0], "fluent-3d")]
    pictures = emoji.pictures(pairs)
    assert again(pictures, pairs, judged) == first(pictures, pairs, judged)
    assert again(pictures, pairs, judged)["both"] == [1.0, 1.0]
    assert again.judge.accuracy == first.judge.accuracy == 1.0
    assert len(list((tmp_path / "judges").iterdir())) == 1


def test_drift_is_zero_where_nothing_moved(scorer: Scorer, emoji: Emoji) -> None:
    pictures = emoji.pictures([(emoji.dev_contents[0], "noto"), (emoji.dev_contents[1], "twemoji")])
    assert scorer.moved(pictures, pictures, ["noto", "twemoji"]) == pytest.approx([0, 0], abs=1e-6)
    assert min(scorer.moved(pictures[::-1].copy(), pictures, ["noto", "twemoji"])) > 0.1


def test_the_frontier_leaves_out_what_is_beaten_in_both() -> None:
    assert outer([(0.2, 0.9), (0.1, 0.5), (0.6, 0.4), (0.6, 0.4), (0.5, 0.4)]) == [(0.2, 0.9), (0.6, 0.4)]


def test_the_table_has_the_best_first_and_its_intervals() -> None:
    def method(content: list[float], style: list[float]) -> dict[str, object]:
        even = {"content": content, "style": style, "feature": [0.5, 0.5, 0.5]}
        return {"about": "x", "shots": {"1": {"even": even}}}

    methods = {"weak": method([0, 0, 1], [1, 0, 0]), "strong": method([1, 1, 1], [1, 1, 0]), "gone": {"rate": None}}
    lines = score_table({"methods": methods, "references": {"truth": {"content": [1, 1, 1]}}}, "1", "even")
    assert [line.split(":")[0] for line in lines[2:4]] == ["| **strong**", "| **weak**"]
    assert "1.00 [1.00, 1.00] | 0.67 [0.00, 1.00] |" in lines[2]
    assert lines[-1].startswith("| *truth* | | 1.00 [1.00, 1.00] |  |")
