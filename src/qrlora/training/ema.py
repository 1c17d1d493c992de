"""An exponential moving average of the coefficients while they are trained (diffusers' `EMAModel`)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from qrlora.training.config import TrainConfig


class MovingAverage:
    """The average: `a <- d a + (1 - d) p` after each step, with `d = min(t / (9 + t), ema_decay)` after `t` steps and
    `a = p` after the first."""

    def __init__(self, config: TrainConfig, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Args:
        config: `ema_decay` is used.
        parameters: what is averaged, by name.
        step: optimiser steps taken so far.
        """
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._average = EMAModel(self._parameters, decay=config.ema_decay, foreach=True)
        self._average.optimization_step = step

    def update(self) -> None:
        """Count the step just taken."""
        self._average.step(self._parameters)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within, the coefficients are the average."""
        trained = [parameter.detach().clone() for parameter in self._parameters]
        self._average.copy_to(self._parameters)
        try:
            yield
        finally:
            for parameter, value in zip(self._parameters, trained, strict=True):
                parameter.data.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the parameters."""
        return dict(zip(self._names, self._average.shadow_params, strict=True))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])


EMA = "ema/"
"""In a checkpoint, before the name of what is averaged."""


def average_of(config: TrainConfig, parameters: Mapping[str, nn.Parameter], step: int) -> MovingAverage | None:
    """None without `use_ema`."""
    return MovingAverage(config, parameters, step) if config.use_ema else None
