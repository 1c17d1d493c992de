"""Which pictures a step sees: a function of (seed, step, batch of the step) and nothing else."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch

from qrlora.training.config import TrainConfig

# Each keeps a stream apart from those of other purposes (1 is objective.py's).
_ORDER, _CLASS_ORDER, _SIZES, _CLASS_SIZES = 2, 3, 4, 5


def stream(*key: int) -> int:
    """A 63-bit seed from integers; different keys, of whatever length, give independent streams."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1


def picture_rows(
    config: TrainConfig,
    counts: Sequence[int],
    step: int,
    micro: int,
    *,
    of_class: bool = False,
) -> tuple[int, list[int]]:
    """The group of pictures of one size that a batch is of, and which of its pictures.

    Each group goes through its pictures, `repeats` times over, in one permutation after another, and its batches are
    cut from that. A cycle has as many batches as there are pictures (times `repeats`), each group's in proportion to
    its pictures and spread evenly. So all pictures are seen equally often: exactly after every cycle, and up to about
    a batch in between.

    Args:
        config: seed, batch size, accumulation and `repeats` are used.
        counts: pictures by group.
        step: optimiser steps taken so far.
        micro: index of the batch within the step.
        of_class: class pictures, which are not repeated, rather than instance pictures.
    """
    repeats = 1 if of_class else config.repeats
    items = tuple(count * repeats for count in counts)
    order, sizes = (_CLASS_ORDER, _CLASS_SIZES) if of_class else (_ORDER, _SIZES)
    cycle, slot = divmod(step * config.gradient_accumulation_steps + micro, sum(items))
    group, batch = _schedule(stream(config.seed, sizes, cycle), items)[slot]
    size, count = config.train_batch_size, items[group]
    first = (cycle * count + batch) * size
    key = (config.seed, order) if len(items) == 1 else (config.seed, order, group)
    rows = [_permutation(stream(*key, item // count), count)[item % count] for item in range(first, first + size)]
    return group, [row % counts[group] for row in rows]


@lru_cache(maxsize=64)
def _permutation(seed: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist())


@lru_cache(maxsize=4)
def _schedule(seed: int, items: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Group and batch within it of every slot of a cycle: batch `k` of `n` falls at random within `[k, k + 1] / n`."""
    generator = torch.Generator().manual_seed(seed)
    places = [
        ((batch + jitter) / count, group, batch)
        for group, count in enumerate(items)
        for batch, jitter in enumerate(torch.rand(count, generator=generator, dtype=torch.float64).tolist())
    ]
    return tuple((group, batch) for _, group, batch in sorted(places))
