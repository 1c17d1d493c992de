"""Means with bootstrap intervals over pairs, and differences of methods on the same pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """For JSON."""
        return [round(self.value, 5), round(self.low, 5), round(self.high, 5)]

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def mean(values: np.ndarray) -> np.ndarray:
    """Over pairs: `[..., pairs, k]` to `[..., k]`, of which the first is taken."""
    return values.mean(axis=-2)[..., 0]


def geometric(values: np.ndarray) -> np.ndarray:
    """The geometric mean of the shares in the columns: `[..., pairs, k]` to `[...]`."""
    return np.prod(values.mean(axis=-2), axis=-1) ** (1 / values.shape[-1])


def bootstrap(
    values: np.ndarray,
    statistic: Statistic = mean,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Interval:
    """The percentile interval of a statistic of pairs drawn with replacement.

    Args:
        values: `[pairs]` or `[pairs, k]`; several seeds of one pair are averaged before, since they are no new pairs.
        statistic: of `[..., pairs, k]`.
        resamples: how many draws.
        seed: of the draws; equal for methods that are compared.
        groups: of each pair, such as its style: whole groups are then drawn, which tells how far a result carries to
            other groups. All of one size.
    """
    rows = values[:, None] if values.ndim == 1 else values
    if not len(rows):
        raise ValueError("there are no pairs to resample")
    places = np.arange(len(rows))[:, None] if groups is None else _by_group(groups, len(rows))
    drawn = np.random.default_rng(seed).integers(len(places), size=(resamples, len(places)))
    spread = statistic(rows[places[drawn].reshape(resamples, -1)])
    low, high = np.quantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(rows)), float(low), float(high))


def _by_group(groups: Sequence[str], pairs: int) -> np.ndarray:
    """The places of each group's pairs, `[groups, pairs of each]`."""
    names = np.asarray(groups)
    if len(names) != pairs:
        raise ValueError(f"{len(names)} groups are told of {pairs} pairs")
    places = [np.flatnonzero(names == name) for name in dict.fromkeys(groups)]
    if len({len(each) for each in places}) > 1:
        raise ValueError("the groups are not of one size")
    return np.stack(places)


def difference(
    one: np.ndarray,
    other: np.ndarray,
    statistic: Statistic = mean,
    *,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Interval:
    """`statistic(one) - statistic(other)` on the same pairs, resampled together: what a comparison needs."""
    if one.shape != other.shape:
        raise ValueError(f"pairs of shapes {one.shape} and {other.shape} are not the same pairs")
    both = np.concatenate([values[:, None] if values.ndim == 1 else values for values in (one, other)], axis=1)
    half = both.shape[1] // 2
    return bootstrap(
        both, lambda rows: statistic(rows[..., :half]) - statistic(rows[..., half:]), seed=seed, groups=groups
    )
