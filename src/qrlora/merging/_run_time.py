"""Rules by which adapters act together while a picture is drawn, for what no file can hold."""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qrlora.adapter import adapters_by_choice
from qrlora.errors import QrloraError
from qrlora.formats import Adapter
from qrlora.merging._registry import RuleMaker, run_time_maker, run_time_names, validated


class RunTimeRule(Protocol):
    """Which adapters act in a layer at a moment."""

    def acting(self, layer: str, progress: float) -> Collection[int]:
        """The places of those that act, in the order in which the rule was given them.

        Args:
            layer: its path.
            progress: 0 at pure noise, 1 at the clean picture.
        """
        ...


def run_time_rule(name: str, adapters: Sequence[Adapter], **options: Any) -> RunTimeRule:
    """What a run-time method makes of some adapters.

    Args:
        name: one of `run_time_names`.
        adapters: in the order that the method wants.
        **options: of the method.

    Raises:
        QrloraError: an unknown method or option, or adapters that it cannot use.
    """
    maker = check_run_time(name)
    return maker(adapters, **validated(name, maker, options, skip=1))


def check_run_time(name: str) -> RuleMaker:
    """Refuse what is no run-time method.

    Raises:
        QrloraError: as said.
    """
    maker = run_time_maker(name)
    if maker is None:
        raise QrloraError(
            f"{name!r} is no method that acts while a picture is drawn, as {', '.join(run_time_names())} is; other "
            "methods make a file, by qrlora merge."
        )
    return maker


@contextmanager
def adapters_by_rule(
    denoiser: nn.Module,
    weights: Mapping[str, float],
    rule: RunTimeRule,
    given: Callable[[Tensor], Tensor] = lambda timesteps: timesteps,
) -> Generator[None]:
    """Within this context each call of the denoiser has in each layer the adapters that a rule chooses.

    How far a picture is, is told by the noise in it and not by counting calls, so that it is right for any number of
    steps. Layers are touched where the choice changes alone; the computation costs no more than one adapter does.

    Args:
        denoiser: with the adapters on it.
        weights: by name, in the order in which the rule was given the adapters. Where one at weight 0 is chosen, the
            base acts alone.
        rule: from `run_time_rule`.
        given: timesteps (0 clean, 1000 pure noise) to what the denoiser is given for them (`Family.given_timesteps`).

    Raises:
        QrloraError: what `adapters_by_choice` raises.
    """
    names = list(weights)
    ends = given(torch.tensor([0.0, 1000.0], dtype=torch.float64))
    clean, whole = float(ends[0]), float(ends[1])  # of some denoisers 1 and 0

    def choose(timestep: Tensor) -> Callable[[str], Collection[str]]:
        progress = min(max((whole - float(timestep)) / (whole - clean), 0.0), 1.0)
        return lambda layer: [names[index] for index in rule.acting(layer, progress)]

    with adapters_by_choice(denoiser, weights, choose):
        yield
