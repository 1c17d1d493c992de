"""A training step without numbers: every allocation of the real computation, counted.

Tensors of PyTorch's `FakeTensorMode` have shapes, dtypes and storages, and take part in autograd, but hold nothing.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qrlora.models import Quantization, forget_tensors, quantized_layers

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A number in 4 bits, a scale in 8 for each 64, and one of 32 bits for each 256 of those."""


class Meter(TorchDispatchMode):
    """Bytes of live storages, now and at most; those of `ignored` tensors (on the host) count nothing."""

    def __init__(self, resident: Iterable[Tensor], ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in ignored:
            self._meet(tensor, counted=False)
        for tensor in resident:
            self._meet(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf)
        return result

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def _meet(self, tensor: Tensor, *, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes() if counted else 0
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._part, key).atexit = False

    def _part(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def widen_norms(model: nn.Module) -> None:
    """Let norms compute in fp32 under autocast, as it is on CUDA and not on the CPU, whose autocast fakes have."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            cast(Any, module).forward = partial(_widened, module, module.forward)


def _widened(module: Any, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return forward(x)
    with torch.autocast("cpu", enabled=False):
        weight, bias = (None if value is None else value.float() for value in (module.weight, module.bias))
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x.float(), module.num_groups, weight, bias, module.eps)
        return F.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps)


@contextmanager
def without_numbers() -> Iterator[FakeTensorMode]:
    """Within, tensors hold nothing; what was left of them is gone afterwards."""
    forget_tensors()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        forget_tensors()
        gc.collect()


def make_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Turn the parameters and buffers of a module on the meta device into fake ones on the CPU, within the mode.

    Args:
        module: on the meta device.
        dtype: of what is floating point, but for adapters, which keep theirs.
    """
    for name, part in module.named_modules():
        for stored in (part._parameters, part._buffers):
            for key, tensor in list(stored.items()):
                if tensor is None:
                    continue
                wanted = dtype if tensor.is_floating_point() and "lora_" not in name else tensor.dtype
                fake: Any = torch.empty(tensor.shape, dtype=wanted, device="cpu")
                stored[key] = nn.Parameter(fake, tensor.requires_grad) if stored is part._parameters else fake
        for key, value in list(vars(part).items()):  # such as Qwen-Image's table of positions
            if isinstance(value, Tensor) and value.is_meta:
                setattr(part, key, torch.empty(value.shape, dtype=value.dtype, device="cpu"))


class PackedLinear(nn.Linear):
    """Takes and leaves the memory that a quantised layer of bitsandbytes or torchao does, forward and backward."""

    def __init__(self, layer: nn.Linear, kind: Quantization, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        numbers = layer.in_features * layer.out_features
        self.compute_dtype = compute_dtype
        size = int(numbers * NF4_BYTES) if kind == "nf4" else numbers + 4 * layer.out_features
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        x = input
        shape = (self.out_features, self.in_features)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        if self.kind == "nf4":
            computed = _FourBits.apply(x.to(self.compute_dtype), self.bias, shape)
            assert isinstance(computed, Tensor)
            return computed.to(x.dtype)  # as bitsandbytes does
        weight = torch.empty(shape, dtype=x.dtype if self.kind == "int8" else self.compute_dtype)
        # the unpacked weight is an ordinary tensor to autograd, which keeps it for the backward pass
        if self.kind == "fp8":
            result = torch.matmul(x, weight.t())
        else:
            flat = torch.mm(x.reshape(-1, x.shape[-1]), weight.t())
            result = (flat * torch.empty(self.out_features, dtype=flat.dtype)).reshape(*x.shape[:-1], -1)
        return result if self.bias is None else result + self.bias


class _FourBits(torch.autograd.Function):
    """bitsandbytes unpacks a weight where it multiplies with it, forward and backward, and keeps none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return F.linear(x, torch.empty(shape, dtype=x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return torch.matmul(gradient, torch.empty(ctx.shape, dtype=gradient.dtype)), None, None


def pack(denoiser: nn.Module, kind: Quantization, compute_dtype: torch.dtype) -> None:
    """Put stand-ins for quantised layers where quantised layers would be; on the meta device."""
    for name in quantized_layers(denoiser):
        parent, _, child = name.rpartition(".")
        layer = denoiser.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(denoiser.get_submodule(parent), child, PackedLinear(layer, kind, compute_dtype))


def size_of(tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> int:
    """Bytes of distinct storages, without those of `but`."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    for tensor in but:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values())
