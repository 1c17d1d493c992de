"""How an adapted Linear computes: peft's own layers, with plain pairs in one product instead of adapter by adapter.

A layer's `forward` is set on the layer, which stays the object of peft's class that it is: state, keys, merging and
everything else are peft's. Whatever is not plain takes peft's own forward.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any, cast
from weakref import ref

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qrlora.adapter._product import autocasts, linear_with_pair, plus_pair
from qrlora.adapter.forms._form import Factor

_PLAN = "_qrlora_plan"
_HOOKS = ("forward", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_Pair = tuple[Tensor, Tensor, float]
"""A `[r, n]`, B `[m, r]`, and their scale."""


def compute_jointly(layer: LoraLayer) -> None:
    """Let an adapted Linear compute its plain adapters in one product from now on; other layers stay as they are."""
    module = cast(nn.Module, layer)
    if not isinstance(layer.get_base_layer(), nn.Linear) or "forward" in vars(module):
        return
    setattr(module, _PLAN, _Plan())
    module.forward = MethodType(forward, module)
    # peft's hotswap writes through `.data`, which counts no version, but asks for this first.
    cast(Any, module).register_state_dict_pre_hook(_forget)


def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of the layer's own, which it calls for whatever is not plain.

    Plain is an adapter without dropout, bias or a computation of its own, on a layer that is not fused; the pair is
    computed in the dtype that the base computes in.
    """
    names = [] if args or kwargs or x.ndim < 2 else _plain_adapters(layer)
    if not names:
        return cast(Any, type(layer)).forward(layer, x, *args, **kwargs)
    A, B, scale = _joint(layer, names)
    base, dtype = layer.base_layer, _compute_dtype(x)
    if not _is_untouched(base) or not _is_frozen(base, dtype, x):
        output = base(x)
        # Some quantised layers give back x's dtype whatever they compute in.
        computed = dtype if autocasts(x) else output.dtype
        return plus_pair(output, x.to(computed), A, B, scale)
    bias = None if base.bias is None else base.bias.to(dtype)
    return linear_with_pair(x.to(dtype), base.weight.to(dtype), bias, A, B, scale)


def _plain_adapters(layer: Any) -> list[str]:
    """The active adapters, if there are any and all of them are plain."""
    if layer.disable_adapters or layer.merged:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return names if all(_is_plain(layer, name) for name in names) else []


def _is_plain(layer: Any, name: str) -> bool:
    dropout = layer.lora_dropout[name]
    return (
        name not in layer.lora_variant
        and not layer.lora_bias.get(name)
        and (isinstance(dropout, nn.Identity) or not dropout.training)
        and _is_untouched(layer.lora_A[name])
        and _is_untouched(layer.lora_B[name])
    )


def _is_untouched(module: nn.Module) -> bool:
    """An ordinary Linear that computes its product and nothing else: no packing, no hook that moves its weight."""
    return type(module) is nn.Linear and not any(module.__dict__.get(key) for key in _HOOKS)


def _is_frozen(base: nn.Linear, dtype: torch.dtype, x: Tensor) -> bool:
    """Whether the base's weights are ordinary ones in the dtype it computes in, and not trained."""
    weight, bias = base.weight, cast(Tensor | None, base.bias)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    as_x = weight.dtype == x.dtype or (autocasts(x) and dtype != torch.float64)
    return not trained and weight.is_floating_point() and as_x and not hasattr(weight, "__tensor_flatten__")


def _compute_dtype(x: Tensor) -> torch.dtype:
    # As autocast does it, which leaves float64 alone.
    if autocasts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _joint(layer: Any, names: list[str]) -> _Pair:
    """One pair for all adapters: their sum where they share a factor, at the sum of their ranks where not."""
    if len(names) == 1:
        A, B, scale = _pair(layer, names[0])
        return (A, B, scale) if not isinstance(scale, Tensor) else (A, B * scale, 1.0)
    # A compiled graph cannot depend on values, so there the ranks add up.
    if torch.compiler.is_compiling():
        groups = [_Group([name]) for name in names]
    else:
        groups = cast(_Plan, getattr(layer, _PLAN)).groups(layer, names)
    pairs = [_sum(group, [_pair(layer, name) for name in group.names]) for group in groups]
    if len(pairs) == 1:
        return *pairs[0], 1.0
    return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1), 1.0


def _pair(layer: Any, name: str) -> tuple[Tensor, Tensor, Any]:
    """The scale is a number, or peft's tensor where adapters of a compiled model are to be swapped."""
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


@dataclass
class _Group:
    """Adapters of one layer that share a factor."""

    names: list[str]
    shared: Factor | None = None


def _sum(group: _Group, pairs: list[tuple[Tensor, Tensor, Any]]) -> tuple[Tensor, Tensor]:
    A, B, scale = pairs[0]
    if group.shared is None:
        return A, B * scale
    place = 0 if group.shared == "lora_B" else 1
    total = pairs[0][place] * scale
    for pair in pairs[1:]:
        total = total + pair[place] * pair[2]
    return (total, B) if group.shared == "lora_B" else (A, total)


class _Plan:
    """Which adapters of a layer hold the same numbers in a frozen factor: compared once, as that waits for the device.

    It holds as long as the same adapters are active, and their frozen factors are the same objects at the same place to
    which nothing was written.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._seen: list[tuple[ref[Tensor], int, int]] = []
        self._groups: list[_Group] = []

    def __deepcopy__(self, memo: Any) -> "_Plan":
        return _Plan()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Plan, ()

    def forget(self) -> None:
        self._names, self._seen, self._groups = [], [], []

    def groups(self, layer: Any, names: list[str]) -> list[_Group]:
        frozen = [tensor for name in names for tensor in _pair(layer, name)[:2] if not tensor.requires_grad]
        if names != self._names or not self._holds_for(frozen):
            self._names, self._groups = names, _grouped(layer, names)
            self._seen = [(ref(tensor), *_state(tensor)) for tensor in frozen]
        return self._groups

    def _holds_for(self, frozen: list[Tensor]) -> bool:
        return len(frozen) == len(self._seen) and all(
            seen() is tensor and (place, version) == _state(tensor)
            for (seen, place, version), tensor in zip(self._seen, frozen, strict=True)
        )


def _grouped(layer: Any, names: list[str]) -> list[_Group]:
    groups: list[_Group] = []
    for name in names:
        for group in groups:
            shared = _shared_factor(layer, group.names[0], name)
            if shared is not None and group.shared in (None, shared):
                group.names.append(name)
                group.shared = shared
                break
        else:
            groups.append(_Group([name]))
    return groups


def _shared_factor(layer: Any, one: str, other: str) -> Factor | None:
    (one_A, one_B, _), (other_A, other_B, _) = _pair(layer, one), _pair(layer, other)
    return "lora_B" if _same(one_B, other_B) else "lora_A" if _same(one_A, other_A) else None


def _same(one: Tensor, other: Tensor) -> bool:
    usable = not any(tensor.requires_grad or tensor.is_inference() or tensor.is_meta for tensor in (one, other))
    return usable and one.shape == other.shape and torch.equal(one, other)


def _state(tensor: Tensor) -> tuple[int, int]:
    """Where it lies, and how often it was written to, which is not counted for tensors made in inference mode."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _forget(module: nn.Module, *_: Any) -> None:
    cast(_Plan, getattr(module, _PLAN)).forget()
