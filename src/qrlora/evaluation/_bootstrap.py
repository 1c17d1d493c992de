"""Means with the percentile interval of the bootstrap (Efron 1979)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean, and between which values it would lie with other pictures of the same kind; one picture has no ends."""

    mean: float
    low: float | None
    high: float | None


def bootstrap_mean(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of values, and the 2.5 and 97.5 percentiles of the means of as many drawn with replacement.

    Args:
        values: one a picture, at least one.
        resamples: how often as many are drawn again.
        seed: of the draws.

    Raises:
        ValueError: no values.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise ValueError("there are no values to take a mean of")
    if len(found) == 1:
        return Interval(float(found[0]), None, None)
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(found))
    means = [
        found[generator.integers(len(found), size=(min(rows, resamples - start), len(found)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(found.mean()), float(low), float(high))
