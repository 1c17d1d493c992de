"""Many adapters on one denoiser at once, each on its own slice of the batch.

Training one small adapter after another leaves most of the time to overheads, and pictures of many merges would each
need their own pass. Here the targeted Linears compute the base once for the whole batch and each adapter's update on
its slice, by the form's own `update` under `torch.vmap`: the mathematics is the library's, not a copy of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrlora.adapter import adaptable_layers
from qrlora.adapter.forms import Form, Held, Start, form_named
from qrlora.basis import Side
from qrlora.errors import QrloraError
from qrlora.formats import Adapter

A, B = "lora_A", "lora_B"


@dataclass
class Stack:
    """One layer of N adapters of one form: tensors by key, with an axis of N in front where they differ.

    Attributes:
        form: what they are.
        side: of the frozen factor.
        scale: `lora_alpha / rank`, times the weight; one for all, or `[N]`.
        tensors: "lora_A", "lora_B" and own tensors.
        each: by key, whether there is an axis of N; the others are shared by all.
    """

    form: Form
    side: Side | None
    scale: Tensor
    tensors: dict[str, Tensor]
    each: dict[str, bool]

    def update(self, x: Tensor, base: Tensor, linear: nn.Linear) -> Tensor:
        """What the adapters add at `x` `[N, n, ..., in]`, where the base alone gives `base` `[N, n, ..., out]`."""

        def one(tensors: Mapping[str, Tensor], scale: Any, x: Tensor, base: Tensor) -> Tensor:
            held = Held(
                B=tensors[B],
                A=tensors[A],
                own={key: tensor for key, tensor in tensors.items() if key not in (A, B)},
                scale=scale,
                frozen=(),
                side=self.side,
                layer="",
                dense=lambda: linear.weight,
                through_A=_linear,
                through_B=_linear,
            )
            return self.form.update(held, x, lambda: base if linear.bias is None else base - linear.bias)

        axes = {key: 0 if self.each[key] else None for key in self.tensors}
        axis = 0 if self.scale.ndim else None
        return torch.vmap(one, in_dims=(axes, axis, 0, 0))(self.tensors, self.scale, x, base)


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


class ManyLinear(nn.Module):
    """A base Linear and, on each of N equal slices of the batch, adapters that add up.

    Args:
        base: what the layer was: the Linear, or peft's wrapper of it.
        linear: the Linear.
        stacks: of N adapters each.
        count: N.
    """

    def __init__(self, base: nn.Module, linear: nn.Linear, stacks: Sequence[Stack], count: int) -> None:
        super().__init__()
        self.base = base
        self.linear = linear
        self.stacks = list(stacks)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        if len(x) % self.count:
            raise QrloraError(f"a batch of {len(x)} cannot be cut into {self.count} equal slices, one an adapter.")
        parts = x.unflatten(0, (self.count, -1))
        result = base = self.base(x).unflatten(0, (self.count, -1))
        for stack in self.stacks:
            result = result + stack.update(parts, base, self.linear)
        return result.flatten(0, 1)


@contextmanager
def carrying(denoiser: nn.Module, layers: Mapping[str, Sequence[Stack]], count: int) -> Iterator[None]:
    """Within this context the batch has `count` equal slices, and slice i has adapter i of every stack."""
    modules = adaptable_layers(denoiser)
    bases: dict[str, nn.Module] = {}
    try:
        for name, stacks in layers.items():
            base: Any = modules[name]
            linear = base.get_base_layer() if hasattr(base, "get_base_layer") else base
            if not isinstance(linear, nn.Linear):
                raise QrloraError(f"{name} is a {type(linear).__name__}; many adapters at once need Linears.")
            denoiser.set_submodule(name, ManyLinear(base, linear, stacks, count))
            bases[name] = base
        yield
    finally:
        for name, base in bases.items():
            denoiser.set_submodule(name, base)


def stacked(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Stack]:
    """Finished adapters, one a slice, as stacks by layer; low-rank forms as their pairs.

    Raises:
        QrloraError: adapters of several forms that are more than a pair.
    """
    forms = {adapter.form for adapter in adapters if adapter.own}
    if len(forms) > 1 or (forms and not all(adapter.own for adapter in adapters)):
        raise QrloraError("adapters of several forms cannot lie on one batch; draw them apart.")
    form = form_named(next(iter(forms)) or "lora") if forms else form_named("lora")
    scale = torch.tensor(list(weights), dtype=torch.float32)
    names = dict.fromkeys(name for adapter in adapters for name in adapter.layers)
    return {name: _layer(name, adapters, form, scale) for name in names}


def _layer(name: str, adapters: Sequence[Adapter], form: Form, scale: Tensor) -> Stack:
    like = next(adapter.layers[name] for adapter in adapters if name in adapter.layers)
    rank = max(adapter.layers[name].rank for adapter in adapters if name in adapter.layers)
    rows: list[dict[str, Tensor]] = []
    for adapter in adapters:
        pair = adapter.layers.get(name)
        if pair is None:  # this adapter leaves the layer alone
            rows.append({A: like.A.new_zeros(rank, like.A.shape[1]), B: like.B.new_zeros(like.B.shape[0], rank)})
            continue
        short = rank - pair.rank
        rows.append({A: F.pad(pair.A, (0, 0, 0, short)), B: F.pad(pair.B, (0, short)), **adapter.own.get(name, {})})
    header = adapters[0].header
    each = {key: any(not torch.equal(row[key], rows[0][key]) for row in rows[1:]) for key in rows[0]}
    tensors = {key: torch.stack([row[key] for row in rows]) if each[key] else rows[0][key] for key in rows[0]}
    return Stack(form, None if header is None else header.side, scale, tensors, each)


@dataclass
class Trainable:
    """N adapters that start alike, ready to train: stacks by layer, and what of them is trained."""

    stacks: dict[str, Stack]
    parameters: list[nn.Parameter]
    masked: list[str]
    """For each parameter: "" or the triangle that stays of its gradient, "upper" or "lower"."""
    count: int

    def mask_gradients(self) -> None:
        """Zero what the mask leaves out, as the library's gradient hook does."""
        for parameter, triangle in zip(self.parameters, self.masked, strict=True):
            if triangle and parameter.grad is not None:
                parameter.grad = parameter.grad.triu() if triangle == "upper" else parameter.grad.tril()

    def held(self, name: str, index: int) -> Held:
        """Adapter `index` on a layer, as its form exports it."""
        stack = self.stacks[name]
        mine = {key: tensor[index] if stack.each[key] else tensor for key, tensor in stack.tensors.items()}
        mine = {key: tensor.detach() for key, tensor in mine.items()}
        frozen = tuple(key for key in (A, B) if not stack.each[key])
        own = {key: tensor for key, tensor in mine.items() if key not in (A, B)}
        return Held(mine[B], mine[A], own, float(stack.scale), frozen, stack.side, name, _none, _linear, _linear)


def _none() -> Tensor:
    raise QrloraError("an export needs no base weight.")


def trainable(
    form: Form, side: Side | None, scale: float, mask: str, starts: Mapping[str, Start], count: int
) -> Trainable:
    """`count` copies of one start.

    Args:
        form: of the adapters.
        side: of the frozen factor, as the header has it.
        scale: `lora_alpha / rank`.
        mask: "full" or "upper", of the coefficients.
        starts: by layer.
        count: N.
    """
    frozen = form.frozen(side)
    stacks: dict[str, Stack] = {}
    parameters: list[nn.Parameter] = []
    masked: list[str] = []
    for name, start in starts.items():
        tensors: dict[str, Tensor] = {A: start.pair.A, B: start.pair.B, **start.own}
        each = {key: key not in frozen if key in (A, B) else key in form.trained_own for key in tensors}
        for key in [key for key in tensors if each[key]]:
            parameter = nn.Parameter(tensors[key].float().expand(count, *tensors[key].shape).clone())
            tensors[key] = parameter
            parameters.append(parameter)
            triangle = {A: "upper", B: "lower"}.get(key, "") if form.masks and mask == "upper" else ""
            masked.append(triangle)
        stacks[name] = Stack(form, side, torch.tensor(float(scale)), tensors, each)
    return Trainable(stacks, parameters, masked, count)
