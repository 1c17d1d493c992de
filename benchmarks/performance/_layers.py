"""One adapted layer, every way there is: ours, peft's, the published one, and the frozen layer that all stand on."""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from benchmarks.performance._measure import CPU, Times, interleaved
from qrlora.adapter import AdapterSpec, BasisCache, add_adapter, trainable_parameters

FROZEN = "frozen layer"
OURS, OURS_INPUT = "qrlora", "qrlora, input side"
PEFT, PEFT_HALF, SCRIPT = "peft LoRA", "peft, B frozen", "peft, fp32 adapters"
PUBLISHED = "published layer"
PRODUCTS = "the products alone"
ALL = (FROZEN, OURS, PEFT, PEFT_HALF, SCRIPT, PUBLISHED, PRODUCTS)


class OneLayer(nn.Module, PeftAdapterMixin):
    """A denoiser of one frozen linear layer, the same for every way."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        out, inputs = shape
        self.layer = nn.Linear(inputs, out, device=device, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(out, inputs, generator=generator) / inputs**0.5)
            self.layer.bias.copy_(torch.randn(out, generator=generator))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, in]` to `[T, out]`."""
        return self.layer(x)


class PublishedLayer(nn.Module):
    """The published code's layer, `y = W_res x + b + s Q (R + dR) x` with `W_res = W - s Q R` (arXiv 2507.04599).

    Args:
        layer: the frozen layer.
        Q: `[out, r]`, orthonormal columns.
        scale: s = lora_alpha / r.
    """

    def __init__(self, layer: nn.Linear, Q: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        dtype = layer.weight.dtype
        self.Q = nn.Parameter(Q.to(dtype), requires_grad=False)
        self.R = nn.Parameter(Q.T.to(dtype) @ layer.weight, requires_grad=False)
        self.W_res = nn.Parameter(layer.weight - scale * self.Q @ self.R, requires_grad=False)
        self.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
        self.dR = nn.Parameter(torch.zeros_like(self.R, dtype=torch.promote_types(dtype, torch.float32)))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """`[T, in]` to `[T, out]`."""
        core = (self.R + self.dR).to(x.dtype)
        return F.linear(x, self.W_res, self.bias) + self.scale * F.linear(F.linear(x, core), self.Q)


@dataclass(frozen=True)
class Setting:
    """One layer in one place: `shape` is `(out, in)`."""

    shape: tuple[int, int]
    tokens: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = CPU

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The input, which needs a gradient as all but a model's first layers' do, and the output's gradient."""
        generator = torch.Generator().manual_seed(1)
        x, gradient = (
            torch.randn(self.tokens, size, generator=generator).to(self.device, self.dtype)
            for size in reversed(self.shape)
        )
        return x.requires_grad_(True), gradient

    def operations(self) -> float:
        """An adapted layer's multiplications over the frozen one's, forward and backward, basis on the output side.

        Frozen: `W x` and `W^T g`, 2 m n a token. Adapter: `A x`, `B h`, `B^T g`, `A^T u` and `u x^T`, r (2 m + 3 n).
        """
        out, inputs = self.shape
        return 1 + self.rank * (2 * out + 3 * inputs) / (2 * out * inputs)


@dataclass
class Way:
    """A layer and how training runs it."""

    model: nn.Module
    trained: list[nn.Parameter]
    autocast: bool = False
    own: bool = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """bf16 as the way's own training loop does it: ours under autocast, casting coefficients and not x."""
        device = next(self.model.parameters()).device.type
        with (
            disable_input_dtype_casting(self.model, active=self.own and self.autocast),
            torch.autocast(device, torch.bfloat16, enabled=self.autocast),
        ):
            yield

    def forward(self, x: Tensor) -> Tensor:
        """As in training."""
        with self.running():
            return self.model(x)

    def step(self, x: Tensor, gradient: Tensor) -> None:
        """Forward and backward."""
        x.grad = None
        for parameter in self.trained:
            parameter.grad = None
        self.forward(x).backward(gradient)


def add_ours(model: nn.Module, names: Sequence[str] = ("adapter",), **spec: Any) -> list[nn.Parameter]:
    """Ours on a denoiser, with trained factors that are not zero; a random basis costs nothing and runs like any other.

    Returns:
        What is trained.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            add_adapter(model, AdapterSpec(**{"basis": "random", **spec}), name, cache=BasisCache(folder))
    trained = [parameter for name in names for parameter in trainable_parameters(model, name).values()]
    _fill(trained)
    return trained


def add_peft(
    model: nn.Module,
    rank: int,
    targets: list[str] | str,
    *,
    fp32: bool = False,
    frozen_B: bool = False,
    name: str = "theirs",
) -> list[nn.Parameter]:
    """peft's LoRA; with `fp32` as diffusers' scripts train it, otherwise in the base's dtype.

    Returns:
        What is trained.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are meant
        cast(Any, model).add_adapter(config, name)
    if frozen_B:
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.requires_grad_(False)
    if fp32:
        cast_training_params(model, dtype=torch.float32)
    trained = [parameter for key, parameter in model.named_parameters() if f".{name}." in key]
    _fill(trained)
    return [parameter for parameter in trained if parameter.requires_grad]


def _fill(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


def way(name: str, setting: Setting, **spec: Any) -> Way:
    """One of the ways, but `PRODUCTS`, on a layer of its own; `spec` is of ours."""
    model = OneLayer(setting.shape, setting.dtype, setting.device)
    mixed, targets = setting.dtype == torch.bfloat16, ["layer"]
    match name:
        case "frozen layer":
            return Way(model, [])
        case "peft LoRA":
            return Way(model, add_peft(model, setting.rank, targets))
        case "peft, B frozen":
            return Way(model, add_peft(model, setting.rank, targets, frozen_B=True))
        case "peft, fp32 adapters":
            return Way(model, add_peft(model, setting.rank, targets, fp32=True), autocast=mixed)
        case "published layer":
            Q = torch.linalg.qr(
                torch.randn(setting.shape[0], setting.rank, generator=torch.Generator().manual_seed(3))
            ).Q
            published = PublishedLayer(model.layer, Q.to(setting.device))
            _fill([published.dR])
            return Way(published, [published.dR])
        case _:
            side = "input" if name == OURS_INPUT else "output"
            trained = add_ours(model, rank=setting.rank, side=side, target_modules=targets, **spec)
            return Way(model, trained, autocast=mixed, own=True)


def products(setting: Setting) -> Callable[[], None]:
    """The frozen layer's two matrix products and the adapter's five, one after the other into tensors that are there
    already: no autograd, nothing cast, nothing allocated."""
    x, gradient = (tensor.detach() for tensor in setting.tensors())
    model = OneLayer(setting.shape, setting.dtype, setting.device)
    weight, bias = model.layer.weight, model.layer.bias
    B = torch.randn(setting.shape[0], setting.rank).to(x)
    A = torch.randn(setting.rank, setting.shape[1]).to(x)
    y, h, u = x.new_empty(len(x), len(weight)), x.new_empty(len(x), setting.rank), x.new_empty(len(x), setting.rank)
    to_x, to_A = torch.empty_like(x), torch.empty_like(A)

    def call() -> None:
        with torch.no_grad():
            torch.addmm(bias, x, weight.T, out=y)
            torch.mm(x, A.T, out=h)
            y.addmm_(h, B.T)
            torch.mm(gradient, weight, out=to_x)
            torch.mm(gradient, B, out=u)
            to_x.addmm_(u, A)
            torch.mm(u.T.contiguous(), x, out=to_A)  # faster than from the transposed view

    return call


def compare(setting: Setting, ways: Sequence[str], repeats: int) -> Times:
    """Forward and backward of each way, in turns."""
    x, gradient = setting.tensors()
    calls: dict[str, Callable[[], object]] = {}
    for name in ways:
        if name == PRODUCTS:
            calls[name] = products(setting)
        else:
            calls[name] = _stepping(way(name, setting), x, gradient)
    return interleaved(calls, repeats, device=setting.device)


def _stepping(one: Way, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    return lambda: one.step(x, gradient)


def deviation(setting: Setting) -> dict[str, float]:
    """Relative errors of the output and of the gradients of x and A, ours and peft's with equal factors, against the
    dense formula in float64."""
    x, gradient = setting.tensors()
    ours = way(OURS, setting, mask="full")
    layer = cast(Any, cast(OneLayer, ours.model).layer)
    A, B = layer.lora_A["adapter"].weight, layer.lora_B["adapter"].weight
    theirs = way(PEFT_HALF, setting)
    with torch.no_grad():
        other = cast(Any, cast(OneLayer, theirs.model).layer)
        other.lora_A["theirs"].weight.copy_(A)
        other.lora_B["theirs"].weight.copy_(B)
    wide = [tensor.detach().double() for tensor in (x, gradient, layer.base_layer.weight, layer.base_layer.bias, A, B)]
    x64, g64, W, b, A64, B64 = wide
    truth = (x64 @ (W + B64 @ A64).T + b, g64 @ (W + B64 @ A64), (g64 @ B64).T @ x64)
    errors: dict[str, float] = {}
    for name, one in (("qrlora", ours), ("peft", theirs)):
        y = one.forward(x)
        x.grad, one.trained[0].grad = None, None
        y.backward(gradient)
        found = (y, x.grad, one.trained[0].grad)
        for what, value, true in zip(("y", "x", "A"), found, truth, strict=True):
            errors[f"{name} {what}"] = float((cast(Tensor, value).detach().double() - true).norm() / true.norm())
    return {name: float(f"{value:.2g}") for name, value in errors.items()}


def shared_copy(model: nn.Module) -> Any:
    """A copy that shares the model's parameters and buffers, for another adapter on the same base."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
