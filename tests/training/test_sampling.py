"""Which pictures a step sees."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.training import TrainConfig
from qrlora.training.sampling import picture_rows, stream


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig.parse({"instance_data_dir": "x", "output_dir": "y"} | changes)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 3), st.integers(0, 100))
def test_every_picture_is_seen_equally_often(count: int, batch: int, accumulation: int, seed: int) -> None:
    config = _config(train_batch_size=batch, gradient_accumulation_steps=accumulation, seed=seed)
    seen = [
        row
        for step in range(count)
        for micro in range(accumulation)
        for row in picture_rows(config, [count], step, micro)[1]
    ]
    assert np.bincount(seen, minlength=count).tolist() == [batch * accumulation] * count


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 100))
def test_one_size_goes_through_one_permutation_after_another(count: int, batch: int, seed: int) -> None:
    """Written out as it always was: what a run of one size sees must never change."""
    config = _config(train_batch_size=batch, seed=seed)
    order: list[int] = []
    for epoch in range(4 * batch):
        generator = torch.Generator().manual_seed(stream(seed, 2, epoch))
        order += torch.randperm(count, generator=generator).tolist()
    for step in range(4 * count):
        assert picture_rows(config, [count], step, 0) == (0, order[step * batch : (step + 1) * batch])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2**62),
)
def test_sizes_take_turns_in_proportion_to_their_pictures(
    counts: list[int], batch: int, repeats: int, of_class: bool, seed: int
) -> None:
    config = _config(train_batch_size=batch, repeats=repeats, seed=seed)
    each = 1 if of_class else repeats
    cycle = sum(counts) * each
    seen: Counter[tuple[int, int]] = Counter()
    turns: Counter[int] = Counter()
    for slot in range(2 * cycle):
        group, rows = picture_rows(config, counts, slot, 0, of_class=of_class)
        assert len(rows) == batch
        turns[group] += 1
        seen.update((group, row) for row in rows)
        for other, count in enumerate(counts):
            # at any time each size had its share of the batches, within one at either end of its stretch
            assert abs(turns[other] - (slot + 1) * count / sum(counts)) < 1 + len(counts)
            times = [seen[other, row] for row in range(count)]
            assert max(times) - min(times) <= each
        if (slot + 1) % cycle == 0:
            expected = (slot + 1) // cycle * batch * each
            assert {seen[g, row] for g, count in enumerate(counts) for row in range(count)} == {expected}


def test_repeats_shuffle_several_copies_together() -> None:
    once = [picture_rows(_config(), [3], step, 0)[1][0] for step in range(300)]
    thrice = [picture_rows(_config(repeats=3), [3], step, 0)[1][0] for step in range(300)]
    assert all(sorted(once[start : start + 3]) == [0, 1, 2] for start in range(0, 300, 3))
    assert all(Counter(thrice[start : start + 9]) == Counter({0: 3, 1: 3, 2: 3}) for start in range(0, 297, 9))
    assert any(sorted(thrice[start : start + 3]) != [0, 1, 2] for start in range(0, 300, 3))


def test_class_pictures_have_an_order_of_their_own() -> None:
    config = _config(train_batch_size=20)
    assert picture_rows(config, [20], 0, 0) != picture_rows(config, [20], 0, 0, of_class=True)
    many = [picture_rows(config, [2, 3], step, 0) for step in range(20)]
    assert many == [picture_rows(config, [2, 3], step, 0) for step in range(20)]
    assert many != [picture_rows(config, [2, 3], step, 0, of_class=True) for step in range(20)]
    assert many != [picture_rows(_config(train_batch_size=20, seed=1), [2, 3], step, 0) for step in range(20)]


def test_streams_differ() -> None:
    keys = [(0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (2**62, 1)]
    assert len({stream(*key) for key in keys}) == len(keys)
