"""Merges that are made while a picture is drawn: which adapter acts in which layer at which timestep."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fusion.many import Stack
from qrlora.adapter import TimestepRange
from qrlora.merging import RunTimeRule

Schedule = Callable[[str, float], Sequence[float]]
"""(layer, timestep from 0, clean, to 1000, pure noise) to what each adapter's weight is multiplied by."""
_TIMESTEPS = 1000  # the embedded base is told timestep / 1000


def by_timesteps(ranges: Sequence[TimestepRange]) -> Schedule:
    """Each adapter within its range alone, both ends included."""

    def factors(layer: str, timestep: float) -> list[float]:
        return [float(low <= timestep <= high) for low, high in ranges]

    return factors


def by_rule(rule: RunTimeRule, count: int) -> Schedule:
    """What a run-time method chooses among `count` adapters."""

    def factors(layer: str, timestep: float) -> list[float]:
        acting = rule.acting(layer, 1 - timestep / _TIMESTEPS)
        return [float(place in acting) for place in range(count)]

    return factors


@contextmanager
def following(
    denoiser: nn.Module, layers: Mapping[str, Sequence[Stack]], schedules: Sequence[Schedule | None]
) -> Iterator[None]:
    """Within this context the weights of `layers` are set before every pass, by the schedule of each slice.

    Args:
        denoiser: carries the stacks.
        layers: the stacks, one an adapter.
        schedules: one a slice; None leaves its weights as they are.
    """
    if all(schedule is None for schedule in schedules):
        yield
        return
    whole = {name: [stack.scale for stack in stacks] for name, stacks in layers.items()}

    def before(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        timesteps: Tensor = given["timestep"].flatten() * _TIMESTEPS
        moment = float(timesteps[0])
        for name, stacks in layers.items():
            ones = [1.0] * len(stacks)
            factors = torch.tensor([ones if one is None else list(one(name, moment)) for one in schedules])
            for stack, scale, factor in zip(stacks, whole[name], factors.T, strict=True):
                stack.scale = scale * factor

    handle = denoiser.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for name, stacks in layers.items():
            for stack, scale in zip(stacks, whole[name], strict=True):
                stack.scale = scale
