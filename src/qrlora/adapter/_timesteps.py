"""Adapters that act within a range of timesteps only: content early, style late."""

import math
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qrlora.adapter._choice import adapters_by_choice
from qrlora.errors import QrloraError

TimestepRange = tuple[float, float]
"""Lowest and highest timestep, both included; 0 is clean, 1000 pure noise."""
ALL_TIMESTEPS: TimestepRange = (0.0, 1000.0)


def check_timesteps(given: TimestepRange, what: str) -> TimestepRange:
    """Refuse a range that is none.

    Args:
        given: lowest and highest timestep.
        what: names it in the error.

    Raises:
        QrloraError: ends outside of 0 to 1000, or in the wrong order.
    """
    low, high = given
    if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high <= 1000):
        raise QrloraError(
            f"{what}: {low:g} to {high:g} is no range of timesteps; give two numbers from 0 (clean) to 1000 (pure "
            "noise), the lower one first."
        )
    return low, high


@contextmanager
def adapters_by_timestep(
    denoiser: nn.Module,
    weights: Mapping[str, float],
    ranges: Mapping[str, TimestepRange],
    given: Callable[[Tensor], Tensor] = lambda timesteps: timesteps,
) -> Generator[None]:
    """Within this context each call of the denoiser has those adapters whose range its timestep lies in.

    A call at which none acts is the base model's, bit for bit. Afterwards all of `weights` are active, and
    layers whose adapters were disabled are so again.

    Args:
        denoiser: its `timestep` (or `t`) is read at each call; a call has one timestep, whatever its batch.
        weights: as for `set_adapters`; an adapter at weight 0 is left out.
        ranges: by adapter; one that is not named here acts always.
        given: timesteps (0 clean, 1000 pure noise) to what the denoiser is given for them, in the dtype it comes in,
            so that a bound is rounded as the timestep is (`Family.given_timesteps`).

    Raises:
        QrloraError: an unknown adapter, a weight that is not finite, or a range that is none; while inside, a call
            without a timestep, or with several.
    """
    for name, bounds in ranges.items():
        if name not in weights:
            raise QrloraError(f"there is a range of timesteps for {name!r}, but no weight; give both.")
        check_timesteps(bounds, name)

    def choose(timestep: Tensor) -> Callable[[str], Collection[str]]:
        names = [name for name in weights if name not in ranges or _within(timestep, ranges[name], given)]
        return lambda layer: names

    with adapters_by_choice(denoiser, weights, choose):
        yield


def _within(timestep: Tensor, bounds: TimestepRange, given: Callable[[Tensor], Tensor]) -> bool:
    dtype = timestep.dtype if timestep.is_floating_point() else torch.float64
    ends = given(torch.tensor(bounds, dtype=dtype))
    return bool((ends.amin() <= timestep) & (timestep <= ends.amax()))  # some denoisers count from noise to clean
