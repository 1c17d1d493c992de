"""Quantised base weights: the packings that are known, and the dense weight that a layer of each computes with."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from qrlora.errors import QrloraError

_TORCHAO = ("Int8Tensor", "Float8Tensor")
_KNOWN = "bitsandbytes (nf4, fp4, int8), torchao (int8, float8) or GGUF"


def packing(weight: Tensor) -> str | None:
    """The name of a weight's packing, such as "bitsandbytes.nf4" or "gguf.q4_k"; None where it is none of the known."""
    kind, untyped = type(weight).__name__, cast(Any, weight)
    if kind == "Params4bit":
        state = untyped.quant_state
        return "bitsandbytes.4bit" if state is None else f"bitsandbytes.{state.quant_type}"
    if kind == "Int8Params":
        return "bitsandbytes.int8"
    if kind == "GGUFParameter":
        return f"gguf.{untyped.quant_type.name.lower()}"
    if type(weight).__module__.startswith("torchao.") and kind in _TORCHAO:
        return f"torchao.{kind.removesuffix('Tensor').lower()}"
    return None


def unpacked(base: nn.Module, layer: str) -> Tensor:
    """The dense weight of a layer with a packed one, in the dtype that its packing gives back; nothing is modified.

    Raises:
        QrloraError: a packing that is not known, or that is to be filled in only when the model is moved.
    """
    weight = cast(Tensor, base.weight)
    name = packing(weight)
    if name is None:
        raise QrloraError(
            f"{layer} has a packed weight of type {type(weight).__name__} ({weight.dtype}), which qrlora cannot read; "
            f"load the base model in float32, bfloat16 or float16, or quantised by {_KNOWN}."
        )
    with torch.no_grad():
        if name.startswith("bitsandbytes."):
            return _from_bitsandbytes(base, weight, name, layer).detach()
        return (_from_gguf(weight, layer) if name.startswith("gguf.") else cast(Any, weight).dequantize()).detach()


def _from_bitsandbytes(base: nn.Module, weight: Tensor, name: str, layer: str) -> Tensor:
    # The bytes of 4 bits may be stored as any dtype, those of int8 are int8.
    if weight.is_floating_point() if name == "bitsandbytes.int8" else cast(Any, weight).quant_state is None:
        raise QrloraError(
            f"{layer} is a bitsandbytes layer whose weight is not quantised yet; move the model to the device it will "
            "run on before adding adapters."
        )
    if name == "bitsandbytes.int8":
        # The first forward moves the scales from the weight to the layer's state.
        scales = cast(Any, weight).SCB
        scales = cast(Any, base).state.SCB if scales is None else scales
        if scales is None:
            raise QrloraError(f"{layer} has an int8 weight without its scales; load the base model again.")
        return weight.data.float() * (cast(Tensor, scales).to(weight.device, torch.float32) / 127).view(-1, 1)
    state = cast(Any, weight).quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return _from_cpu_kernel(weight.data, state)
    functional: Any = import_module("bitsandbytes.functional")
    return functional.dequantize_4bit(weight.data, state)


def _from_cpu_kernel(packed: Tensor, state: Any) -> Tensor:
    """4 bits as bitsandbytes rearranges them at the first forward on a CPU with AVX512-BF16; it cannot unpack them.

    A byte of `packed [out, in / 2]` holds, of 32 rows and two columns, one entry of the first 16 rows in its low and
    one of the last 16 in its high half; `absmax` becomes `[in / blocksize, out]`.
    """
    out, inputs = packed.shape[0], packed.shape[1] * 2
    groups = packed.view(torch.uint8).reshape(out // 32, inputs // 2, 32)
    halves = torch.cat([groups & 15, groups >> 4], dim=-1).reshape(out // 32, inputs // 2, 32, 2)
    values = cast(Tensor, state.code).float()[halves.transpose(1, 2).reshape(out, inputs).long()]
    scales = cast(Tensor, state.absmax).float().T.repeat_interleave(int(state.blocksize), dim=1)
    return values * scales


def _from_gguf(weight: Tensor, layer: str) -> Tensor:
    # peft's own function returns GGUF's packed bytes as if they were the weight.
    functions: Any = import_module("diffusers.quantizers.gguf.utils")
    kind = cast(Any, weight).quant_type
    if kind not in functions.dequantize_functions:
        raise QrloraError(
            f"{layer} has a GGUF weight of type {kind.name}, which this diffusers cannot unpack; use a file in "
            f"{', '.join(sorted(known.name for known in functions.dequantize_functions))}."
        )
    return cast(Tensor, functions.dequantize_gguf_tensor(weight))


def keep_gradients(denoiser: nn.Module) -> None:
    """Make sure that gradients pass through every layer of a model that an adapter is to be trained on.

    On a CPU with AVX512-BF16, the first forward without gradients lets bitsandbytes rearrange 4-bit weights for a
    kernel that has no backward. It is kept from doing so from here on; what it computes otherwise stays the same.

    Raises:
        QrloraError: it has happened already, naming the layer.
    """
    for name, module in cast(Iterator[tuple[str, nn.Module]], denoiser.named_modules()):
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(cast(Any, module).weight.quant_state, "packing_format_for_cpu", False):
            raise QrloraError(
                f"{name} was rearranged by bitsandbytes for making pictures on this CPU, which passes no gradients; "
                "load the base model again and add the adapter before anything else."
            )
        cast(Any, module).support_avx512bf16_for_cpu = False
