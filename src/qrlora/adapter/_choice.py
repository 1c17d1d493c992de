"""Which adapters act in which layers, chosen anew at each call of the denoiser by its timestep."""

import inspect
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qrlora.adapter._control import adapted_layers, enable_layers, set_adapters
from qrlora.adapter._peft import lora_layers
from qrlora.errors import QrloraError

Choice = Callable[[Tensor], Callable[[str], Collection[str]]]
"""A timestep, as the denoiser is given it, to a function of a layer's path to the names of the adapters that act
there."""


@contextmanager
def adapters_by_choice(denoiser: nn.Module, weights: Mapping[str, float], choose: Choice) -> Generator[None]:
    """Within this context each call of the denoiser has in each layer the adapters chosen for its timestep.

    A layer for which none is chosen is the base's, bit for bit. Layers are touched where the choice changes alone.
    Afterwards all of `weights` are active, and layers whose adapters were disabled are so again.

    Args:
        denoiser: its `timestep` (or `t`) is read at each call; a call has one timestep, whatever its batch.
        weights: as for `set_adapters`; an adapter at weight 0 is left out.
        choose: asked before each call.

    Raises:
        QrloraError: an unknown adapter, or a weight that is not finite; while inside, a call without a timestep, or
            with several.
    """
    disabled = {layer: layer.disable_adapters for layer in adapted_layers(denoiser)}
    set_adapters(denoiser, weights)
    acting = [name for name, weight in weights.items() if weight != 0]
    handle = denoiser.register_forward_pre_hook(_Switch(denoiser, acting, choose), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        set_adapters(denoiser, weights)
        for layer, was in disabled.items():
            enable_layers([layer], enabled=not was)


class _Switch:
    """A hook before the denoiser that sets the adapters for the call about to be made, where they change."""

    def __init__(self, denoiser: nn.Module, acting: Sequence[str], choose: Choice) -> None:
        self._choose = choose
        self._paths = dict.fromkeys(adapted_layers(denoiser), "")
        self._carried: dict[LoraLayer, list[str]] = {layer: [] for layer in self._paths}
        for name in acting:
            for path, layer in lora_layers(denoiser, name).items():
                self._paths[layer] = path
                self._carried[layer].append(name)
        self._now: dict[LoraLayer, list[str] | None] = dict.fromkeys(self._paths)

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen = self._choose(_timestep_of(denoiser, args, kwargs))
        for layer, carried in self._carried.items():
            wanted = chosen(self._paths[layer]) if carried else ()
            names = [name for name in carried if name in wanted]
            if names != self._now[layer]:
                self._now[layer] = names
                enable_layers([layer], enabled=bool(names))
                if names:
                    cast(Any, layer).set_adapter(names)


def _timestep_of(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one timestep of a call, as it was given."""
    found = kwargs.get("timestep")
    if found is None:
        arguments = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
        found = arguments.get("timestep", arguments.get("t"))
    if found is None:
        raise QrloraError(
            f"{type(denoiser).__name__} was called without a timestep, by which its adapters are to be chosen."
        )
    values = torch.as_tensor(found).detach().cpu().flatten()
    if bool((values != values[0]).any()):
        raise QrloraError("adapters chosen by timestep need calls of the denoiser with one timestep each.")
    return values[0]
