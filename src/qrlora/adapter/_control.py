"""Adapters that are on a denoiser already: which are trained, which are active, and none at all."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn

from qrlora.adapter._peft import (
    active_adapters,
    as_mixin,
    configs,
    frozen_factors,
    lora_layers,
    mask_gradient,
    record_of,
    weight_of,
)
from qrlora.adapter._variant import OWN, own_tensors
from qrlora.adapter.forms._form import FACTORS
from qrlora.errors import QrloraError
from qrlora.formats import check_weight


def trainable_parameters(denoiser: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The parameters of an adapter that are trained, whether or not it is active now, in the order of the model.

    The mask of their gradients is put back where a copy of the model lost it.

    Returns:
        Parameters by `{layer}.lora_A.weight`, `{layer}.lora_B.weight`, or `{layer}.{key}` for those that a form adds;
        empty for an adapter attached frozen.

    Raises:
        QrloraError: no such adapter.
    """
    header = record_of(denoiser, adapter_name).header if adapter_name in configs(denoiser) else None
    found: dict[str, nn.Parameter] = {}
    for name, layer in lora_layers(denoiser, adapter_name).items():
        frozen = frozen_factors(layer, adapter_name)
        for factor in FACTORS:
            if factor in frozen:
                continue
            parameter = weight_of(layer, factor, adapter_name)
            if header is not None and header.mask == "upper":
                mask_gradient(parameter, factor)
            found[f"{name}.{factor}.weight"] = parameter
        own = own_tensors(layer, adapter_name)
        if own is not None and OWN not in frozen:
            found |= {f"{name}.{key}": parameter for key, parameter in own.named_parameters()}
    return found


def set_adapters(denoiser: nn.Module, weights: Mapping[str, float]) -> None:
    """Make these adapters active, each at its weight, and all others inactive.

    Raises:
        QrloraError: none given, an unknown name, or a weight that is not finite.
    """
    if not weights:
        raise QrloraError("no adapters to set; use adapters_disabled for the base model alone.")
    known = configs(denoiser)
    for name, weight in weights.items():
        if name not in known:
            raise QrloraError(f"there is no adapter {name!r} on the denoiser; there are: {', '.join(known) or 'none'}.")
        check_weight(weight)
    as_mixin(denoiser).set_adapters(list(weights), list(weights.values()))


@contextmanager
def adapters_disabled(denoiser: nn.Module) -> Generator[None]:
    """Within this context the denoiser is its base model, bit for bit; afterwards adapters are as they were."""
    enabled = [layer for layer in adapted_layers(denoiser) if not layer.disable_adapters]
    enable_layers(enabled, enabled=False)
    try:
        yield
    finally:
        enable_layers(enabled, enabled=True)


def adapted_layers(denoiser: nn.Module) -> list[LoraLayer]:
    """The layers that carry any adapter."""
    layers = [module for name in configs(denoiser) for module in lora_layers(denoiser, name).values()]
    return list(dict.fromkeys(layers))


def enable_layers(layers: Iterable[LoraLayer], *, enabled: bool) -> None:
    """Let adapters act in these layers, or not."""
    for layer in layers:
        if layer.disable_adapters == enabled:
            layer.enable_adapters(enabled)


def remove_adapter(denoiser: nn.Module, adapter_name: str) -> None:
    """Take an adapter off; the others stay active or inactive as they were.

    Raises:
        QrloraError: no such adapter.
    """
    lora_layers(denoiser, adapter_name)
    mixin = as_mixin(denoiser)
    # peft would activate another adapter in the place of a removed active one.
    mixin.set_adapter([name for name in active_adapters(denoiser) if name != adapter_name])
    mixin.delete_adapters(adapter_name)
