"""The one place that knows peft's `lora_variant`: forms with a computation or tensors of their own, in peft's layers.

`LoraVariant` is private to peft ("prone to change"); the tests hold what is used of it here.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from qrlora.adapter._weights import base_layer, dense_weight
from qrlora.adapter.forms import Form, Held, form_named
from qrlora.basis import Side
from qrlora.errors import QrloraError

OWN = "lora_own"
"""The layer's container of own tensors; "lora_" marks them as an adapter's for peft."""


class OwnTensors(nn.Module):
    """The own tensors of one adapter in one layer: trained ones as parameters, the others as buffers."""

    def __init__(self, tensors: Mapping[str, Tensor], trained: tuple[str, ...], device: torch.device) -> None:
        super().__init__()
        # One order, also for what comes from a file: gradients are summed in it.
        for key, tensor in sorted(tensors.items()):
            values = tensor.detach().to(device, torch.float32, copy=True).contiguous()
            if key in trained:
                self.register_parameter(key, nn.Parameter(values))
            else:
                self.register_buffer(key, values)

    def tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


class FormVariant(LoraVariant):
    """peft's per-adapter hook, which asks the form."""

    def __init__(self, form: str, side: Side | None) -> None:
        self.form = form
        self.side: Side | None = side

    @property
    def _form(self) -> Form:
        return form_named(self.form)

    def supports_lora_conversion(self) -> bool:
        return self._form.low_rank

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (static in peft, called on an object)
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        held = held_by(module, active_adapter, "", float(cast(Any, module).scaling[active_adapter]), self.side)

        def base() -> Tensor:
            if next(name for name in module.active_adapters if name in module.lora_A) == active_adapter:
                return _without_bias(module, result)
            # The result has more in it, so the base's part is computed again; its weight goes where lora_A does.
            weight = held.dense()
            return held.through_A(weight, x.to(weight.dtype))

        return result + self._form.update(held, x, base)

    def merge_safe(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: LoraLayer, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        return orig_weight + self._delta(module, active_adapter, orig_weight)

    def merge_unsafe(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: LoraLayer, active_adapter: str, orig_weight: Tensor
    ) -> None:
        orig_weight.data += self._delta(module, active_adapter, orig_weight)

    def unmerge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: LoraLayer, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        return orig_weight.data - self._delta(module, active_adapter, orig_weight)

    def _delta(self, module: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
        if not self._form.low_rank:
            raise QrloraError(
                f"adapter {adapter_name!r} is a {self.form} adapter, which is more than W + B A and cannot be fused "
                "into a base weight; keep it attached instead."
            )
        scale = float(cast(Any, module).scaling[adapter_name])
        with torch.no_grad():
            pair = self._form.export(held_by(module, adapter_name, "", scale, self.side)).pair
            return pair.delta().reshape(weight.shape).to(weight.dtype)


def own_tensors(layer: LoraLayer, adapter_name: str) -> OwnTensors | None:
    container = cast(nn.ModuleDict | None, getattr(layer, OWN, None))
    if container is None or adapter_name not in container:
        return None
    return cast(OwnTensors, container[adapter_name])


def give_form(layer: LoraLayer, adapter_name: str, form: Form, own: Mapping[str, Tensor], side: Side | None) -> None:
    """Make an injected plain adapter one of `form`: its own tensors, and its own computation where it has one."""
    device = cast(Tensor, layer.lora_A[adapter_name].weight).device
    if own:
        if not hasattr(layer, OWN):
            cast(nn.Module, layer).add_module(OWN, nn.ModuleDict())
            # What peft activates, freezes and deletes with an adapter.
            layer.adapter_layer_names = (*layer.adapter_layer_names, OWN)
        cast(nn.ModuleDict, getattr(layer, OWN))[adapter_name] = OwnTensors(own, form.trained_own, device)
    if form.has_update:
        layer.lora_variant[adapter_name] = FormVariant(form.name, side)


def held_by(layer: LoraLayer, adapter_name: str, name: str, scale: float, side: Side | None) -> Held:
    """The adapter's tensors in a layer, as they are (not copies), at a scale."""
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    own = own_tensors(layer, adapter_name)
    return Held(
        B=cast(Tensor, B.weight),
        A=cast(Tensor, A.weight),
        own=own.tensors() if own is not None else {},
        scale=scale,
        frozen=layer.frozen_peft_weight_names.get(adapter_name, ()),
        side=side,
        layer=name,
        dense=lambda: dense_weight(cast(nn.Module, layer), name),
        through_A=lambda tensor, x: _through(A, tensor, x),
        through_B=lambda tensor, h: _through(B, tensor, h),
    )


def _without_bias(layer: LoraLayer, output: Tensor) -> Tensor:
    bias = cast(Tensor | None, base_layer(cast(nn.Module, layer)).bias)
    if bias is None:
        return output
    return output - (bias.reshape(1, -1, 1, 1) if output.ndim == 4 else bias)


def _through(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """`module(x)` with another weight."""
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation, module.groups)
    return F.linear(x, weight)
