"""All that touches peft's and diffusers' insides: injection, freezing, masks, and an adapter's memory of itself.

Forms with a computation of their own stand in `_variant`.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import peft_utils
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin as EncoderMixin

from qrlora.adapter._forward import compute_jointly
from qrlora.adapter._variant import OWN, give_form, held_by, own_tensors
from qrlora.adapter._weights import base_weight, path_stem
from qrlora.adapter.forms import Form, Held, Start
from qrlora.adapter.forms._form import Factor, upper_triangle
from qrlora.adapter.forms.lora import PLAIN_LORA
from qrlora.basis import Side
from qrlora.errors import QrloraError
from qrlora.formats import Component, Header

_RECORD = "qrlora_record"


@dataclass(frozen=True)
class Record:
    """What an adapter on a denoiser remembers of itself, kept on its peft config, so that it goes where that goes."""

    header: Header | None
    form: str = PLAIN_LORA
    """What it is in memory: a file of another form that is not trained further may be here as its plain pair."""

    @property
    def side(self) -> Side | None:
        return self.header.side if self.header is not None else None


@dataclass(frozen=True)
class Injection:
    """An adapter about to be put on a denoiser: its tensors without their scale, and which of them stay frozen."""

    starts: Mapping[str, Start]
    form: Form
    scale: float
    frozen: tuple[str, ...]
    masked: Factor | None
    record: Record


def masked_factor(form: Form, mask: str, side: Side | None) -> Factor | None:
    """The factor whose gradient is masked, if any."""
    if not form.masks or mask != "upper" or side is None:
        return None
    return "lora_A" if side == "output" else "lora_B"


def as_mixin(denoiser: nn.Module) -> Any:
    """The denoiser, or a text encoder of transformers, untyped, with the adapter methods of diffusers."""
    if isinstance(denoiser, PeftAdapterMixin):
        return denoiser
    if isinstance(denoiser, EncoderMixin):
        return _Encoder(denoiser)
    raise QrloraError(
        f"{type(denoiser).__name__} is not a diffusers denoiser that takes adapters; pass pipeline.transformer or "
        "pipeline.unet, or a text encoder."
    )


class _Encoder:
    """What transformers' mixin calls otherwise."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.add_adapter, self.set_adapter, self.delete_adapters = (
            encoder.add_adapter,
            encoder.set_adapter,
            encoder.delete_adapter,
        )

    def set_adapters(self, adapter_names: list[str], weights: list[float]) -> None:
        cast(Any, peft_utils).set_weights_and_activate_adapters(self._encoder, adapter_names, weights)


def component_of(denoiser: nn.Module) -> Component:
    """The component, by class; of a text encoder the first, as its class does not tell its place in a pipeline."""
    if isinstance(denoiser, EncoderMixin):
        return "text_encoder"
    return "unet" if "UNet" in type(denoiser).__name__ else "transformer"


def configs(denoiser: nn.Module) -> dict[str, Any]:
    """The peft configs of the adapters on the denoiser, by name."""
    return cast(dict[str, Any], getattr(denoiser, "peft_config", None) or {})


def record_of(denoiser: nn.Module, adapter_name: str) -> Record:
    return cast(Record, getattr(configs(denoiser)[adapter_name], _RECORD, Record(None)))


def lora_layers(denoiser: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers that carry the adapter, by path, in the order of the model.

    Raises:
        QrloraError: no adapter of that name.
    """
    known = configs(denoiser)
    if adapter_name not in known:
        raise QrloraError(
            f"there is no adapter {adapter_name!r} on the denoiser; there are: {', '.join(known) or 'none'}."
        )
    modules, stem = cast(Iterator[tuple[str, nn.Module]], denoiser.named_modules()), path_stem(denoiser)
    return {
        stem + name: module
        for name, module in modules
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def base_scale(layer: LoraLayer, adapter_name: str) -> float:
    """The adapter's own scale, `alpha / r`, without the weight that `set_adapters` gave it."""
    untyped = cast(Any, layer)
    rank, alpha = int(untyped.r[adapter_name]), float(untyped.lora_alpha[adapter_name])
    return alpha / math.sqrt(rank) if layer.use_rslora.get(adapter_name) else alpha / rank


def weight_of(layer: LoraLayer, factor: Factor, adapter_name: str) -> nn.Parameter:
    return cast(nn.Parameter, cast(nn.ModuleDict, getattr(layer, factor))[adapter_name].weight)


def held(denoiser: nn.Module, adapter_name: str) -> dict[str, Held]:
    """The adapter's tensors by layer, at its own scale.

    Raises:
        QrloraError: no adapter of that name.
    """
    layers, side = lora_layers(denoiser, adapter_name), record_of(denoiser, adapter_name).side
    return {
        name: held_by(layer, adapter_name, name, base_scale(layer, adapter_name), side)
        for name, layer in layers.items()
    }


def frozen_factors(layer: LoraLayer, adapter_name: str) -> tuple[str, ...]:
    return layer.frozen_peft_weight_names.get(adapter_name, ())


def active_adapters(denoiser: nn.Module) -> list[str]:
    for module in denoiser.modules():
        if isinstance(module, LoraLayer):
            return [name for name in module.active_adapters if name in configs(denoiser)]
    return []


def check_new_name(denoiser: nn.Module, adapter_name: str) -> None:
    """Refuse names that are taken, or that peft or diffusers cannot carry.

    Raises:
        QrloraError: as said.
    """
    if adapter_name in configs(denoiser):
        raise QrloraError(
            f"there is already an adapter {adapter_name!r} on the denoiser; remove it first or choose another name."
        )
    # peft keeps adapters as attributes of a ModuleDict, which has some of its own only once it is made (`training`).
    if hasattr(nn.ModuleDict(), adapter_name):
        raise QrloraError(
            f"adapter name {adapter_name!r} cannot be used, since torch's modules have an attribute of that name; take "
            "another, such as 'content'."
        )
    # One letter is found inside other keys by diffusers' substring search; a dot separates modules.
    if not re.fullmatch(r"\w[\w-]+", adapter_name) or "lora_" in adapter_name:
        raise QrloraError(
            f"adapter name {adapter_name!r} cannot be used; take two or more letters, digits, - or _, such "
            "as 'content'."
        )


def inject(denoiser: nn.Module, adapter_name: str, injection: Injection) -> None:
    """Put an adapter on by a plain `LoraConfig`, then set, freeze and mask its factors; it alone is active.

    All checks were made before: from here on nothing is expected to fail. The global random state is left as it was.
    """
    mixin = as_mixin(denoiser)
    config = _config(injection, path_stem(denoiser))
    # Without values: peft's random ones would be replaced here, and drawing them takes longer than all the rest.
    with cast(Any, torch.random).fork_rng(devices=[]), warnings.catch_warnings(), torch.device("meta"):
        # Several adapters on one model are what this package is for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        mixin.add_adapter(config, adapter_name)
    setattr(configs(denoiser)[adapter_name], _RECORD, injection.record)
    side = injection.record.side
    for name, layer in lora_layers(denoiser, adapter_name).items():
        pair, own = injection.starts[name].pair, injection.starts[name].own
        device = base_weight(cast(nn.Module, layer)).device
        for factor, tensor in (("lora_A", pair.A), ("lora_B", pair.B)):
            module = cast(nn.ModuleDict, getattr(layer, factor))[adapter_name]
            # A copy in fp32, whatever the base's dtype: adapters never share storage, which loaders overwrite in place.
            values = tensor.detach().to(device, torch.float32, copy=True).contiguous()
            module.weight = nn.Parameter(values, requires_grad=factor not in injection.frozen)
        give_form(layer, adapter_name, injection.form, own, side)
        if not injection.form.has_update:
            compute_jointly(layer)
        # peft reapplies this after set_adapter, enabling and copying; a bare requires_grad_(False) would be undone.
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: injection.frozen}
        if OWN in injection.frozen and own:
            cast(nn.Module, own_tensors(layer, adapter_name)).requires_grad_(False)
        if injection.masked is not None:
            mask_gradient(weight_of(layer, injection.masked, adapter_name), injection.masked)


def _config(injection: Injection, stem: str) -> LoraConfig:
    """By the model's own paths, which are ours without `stem`."""
    ranks = {name.removeprefix(stem): start.pair.rank for name, start in injection.starts.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": other for name, other in ranks.items() if other != rank}
    alphas = {name: _whole(other * injection.scale) for name, other in pattern.items()}
    # An expression, since peft would also match a listed name at the end of a longer path.
    targets = "|".join(re.escape(name) for name in ranks)
    alpha: Any = _whole(rank * injection.scale)
    return LoraConfig(r=rank, lora_alpha=alpha, rank_pattern=pattern, alpha_pattern=alphas, target_modules=targets)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


class _UpperTriangle:
    """Gradient hook that keeps the upper triangle of the coefficients, seen as `[r, n]`."""

    def __init__(self, factor: Factor) -> None:
        self.factor: Factor = factor

    def __call__(self, gradient: Tensor) -> Tensor:
        return upper_triangle(gradient, self.factor)


def mask_gradient(parameter: nn.Parameter, factor: Factor) -> None:
    """Zero the masked part of every gradient, once a parameter.

    A zero gradient on a zero entry stays exactly zero through Adam and weight decay, so the forward needs no mask.
    Copies of a parameter lose their hooks; `trainable_parameters` calls this again.
    """
    hooks = cast(Mapping[int, object], parameter._backward_hooks or {})  # pyright: ignore[reportPrivateUsage]
    if any(isinstance(hook, _UpperTriangle) for hook in hooks.values()):
        return
    wanted = parameter.requires_grad
    parameter.requires_grad_(True)
    cast(Any, parameter).register_hook(_UpperTriangle(factor))
    parameter.requires_grad_(wanted)


def zero_masked(parameters: Iterable[nn.Parameter]) -> None:
    """Set masked entries to exactly zero again, after an optimiser that moves entries whose gradients are all zero."""
    for parameter in parameters:
        hooks = cast(Mapping[int, object], parameter._backward_hooks or {})  # pyright: ignore[reportPrivateUsage]
        for hook in hooks.values():
            if isinstance(hook, _UpperTriangle):
                parameter.data.copy_(upper_triangle(parameter.data, hook.factor))
