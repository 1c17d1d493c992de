"""Adapters that act within a range of timesteps only: content early, style late."""

import inspect
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qrlora.adapter._control import adapted_layers, enable_layers, set_adapters
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
        denoiser: its `timestep` is read at each call; a call has one timestep, whatever its batch.
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
    disabled = {layer: layer.disable_adapters for layer in adapted_layers(denoiser)}
    set_adapters(denoiser, weights)
    acting = {name: weight for name, weight in weights.items() if weight != 0}
    switch = _Switch(acting, {name: ranges[name] for name in acting if name in ranges}, given)
    handle = denoiser.register_forward_pre_hook(switch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        set_adapters(denoiser, weights)
        for layer, was in disabled.items():
            enable_layers([layer], enabled=not was)


class _Switch:
    """A hook before the denoiser that sets the adapters for the call about to be made, where they change."""

    def __init__(
        self,
        weights: Mapping[str, float],
        ranges: Mapping[str, TimestepRange],
        given: Callable[[Tensor], Tensor],
    ) -> None:
        self._weights, self._ranges, self._given = weights, ranges, given
        self._now: list[str] | None = None

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = self._acting(_timestep_of(denoiser, args, kwargs))
        if names == self._now:
            return
        self._now = names
        enable_layers(adapted_layers(denoiser), enabled=bool(names))
        if names:
            set_adapters(denoiser, {name: self._weights[name] for name in names})

    def _acting(self, timestep: Tensor) -> list[str]:
        values = timestep.detach().cpu().flatten()
        if bool((values != values[0]).any()):
            raise QrloraError("adapters with a range of timesteps need calls of the denoiser with one timestep each.")
        return [name for name in self._weights if name not in self._ranges or self._within(name, values[0])]

    def _within(self, name: str, value: Tensor) -> bool:
        dtype = value.dtype if value.is_floating_point() else torch.float64
        bounds = self._given(torch.tensor(self._ranges[name], dtype=dtype))
        return bool((bounds[0] <= value) & (value <= bounds[1]))


def _timestep_of(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = kwargs.get("timestep")
    if found is None:
        found = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments.get("timestep")
    if found is None:
        raise QrloraError(f"{type(denoiser).__name__} was called without a timestep, which adapters with a range need.")
    return torch.as_tensor(found)
