"""Quantised bases: the basis comes from the weight the layer computes with, told by the packing's own definition."""

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import gguf
import numpy as np
import pytest
import torch
import torchao.quantization as ao
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from torch import Tensor, nn

from qrlora.adapter import (
    adapter_of,
    adapters_disabled,
    add_adapter,
    attach_adapter,
    base_hash,
    dense_weight,
    trainable_parameters,
)
from qrlora.basis import make_basis, principal_angle
from qrlora.errors import QrloraError, QrloraWarning
from tests.adapter.test_add_adapter import shake, spec_for
from tests.tiny_models import FLUX_TARGETS, flux_inputs, output, run, tiny_flux

# These packages warn of missing kernels and deprecations of their own.
pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH = 64
# QLoRA (arXiv 2305.14314), appendix E.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def as_nf4(weight: Tensor) -> Tensor:
    """Blocks of 64 along the rows, each over its largest magnitude, to the nearest of 16 levels."""
    blocks = weight.double().reshape(-1, 64).numpy()
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    levels = NF4[np.abs((blocks / scale)[..., None] - NF4).argmin(axis=-1)]
    return torch.from_numpy(levels * scale).reshape(weight.shape)


def as_int8(weight: Tensor, steps: float = 127) -> Tensor:
    """Rows over a 127th of their largest magnitude, rounded; torchao spreads -128..127 and has 127.5 steps."""
    scale = weight.double().abs().amax(dim=1, keepdim=True) / steps
    return (weight.double() / scale).round() * scale


def as_float8(weight: Tensor) -> Tensor:
    """Rows over a 448th of their largest magnitude, in e4m3."""
    scale = weight.double().abs().amax(dim=1, keepdim=True) / 448
    return (weight.double() / scale).float().to(torch.float8_e4m3fn).double() * scale


def as_q8_0(weight: Tensor) -> Tensor:
    """Blocks of 32 over a half-precision 127th of their largest magnitude, rounded."""
    blocks = weight.double().reshape(-1, 32)
    exact = blocks.abs().amax(dim=1, keepdim=True) / 127
    return ((blocks / exact).round() * exact.half().double()).reshape(weight.shape)


def as_q4_0(weight: Tensor) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(quantized_by_gguf(weight, "Q4_0"), kind("Q4_0"))).double()


def kind(name: str) -> Any:
    return getattr(gguf.GGMLQuantizationType, name)


def quantized_by_gguf(weight: Tensor, name: str) -> Any:
    return gguf.quants.quantize(weight.detach().numpy(), kind(name))


def four_bits(layer: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.float32)
    made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.bias = layer.bias
    return made.to("cpu")


def eight_bits(layer: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to("cpu")


def packed_by_gguf(layer: nn.Linear, name: str) -> nn.Module:
    made = GGUFLinear(layer.in_features, layer.out_features, compute_dtype=torch.float32)
    made.weight = GGUFParameter(torch.from_numpy(quantized_by_gguf(layer.weight, name).copy()), quant_type=kind(name))
    made.bias = layer.bias
    return made


def by_torchao(config: Any) -> Callable[[nn.Linear], nn.Module]:
    def replace(layer: nn.Linear) -> nn.Module:
        holder = nn.Sequential(layer)
        ao.quantize_(holder, config)
        return holder[0]

    return replace


# Replacement, the definition in float64, its tolerance (8-bit or half-precision scales), the header's label.
WAYS: dict[str, tuple[Callable[[nn.Linear], nn.Module], Callable[[Tensor], Tensor], float, str]] = {
    "nf4": (four_bits, as_nf4, 1e-3, "packed-bitsandbytes.nf4-float32:"),
    "int8": (eight_bits, as_int8, 2e-3, "packed-bitsandbytes.int8-float32:"),
    "torchao int8": (
        by_torchao(ao.Int8WeightOnlyConfig()),
        lambda x: as_int8(x, 127.5),
        2e-3,
        "packed-torchao.int8-float32:",
    ),
    "torchao fp8": (by_torchao(ao.Float8WeightOnlyConfig()), as_float8, 1e-2, "packed-torchao.float8-float32:"),
    "q8_0": (lambda x: packed_by_gguf(x, "Q8_0"), as_q8_0, 1e-3, "packed-gguf.q8_0-float16:"),
    "q4_0": (lambda x: packed_by_gguf(x, "Q4_0"), as_q4_0, 1e-3, "packed-gguf.q4_0-float16:"),
}


def quantized(way: str) -> Any:
    denoiser = tiny_flux(width=WIDTH)
    for name, module in list(denoiser.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(f".{target}" for target in FLUX_TARGETS)):
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, WAYS[way][0](module))
    return denoiser


@pytest.mark.parametrize("way", WAYS)
def test_start_basis_training_and_return(way: str) -> None:
    denoiser, given, plain = quantized(way), flux_inputs(width=WIDTH), tiny_flux(width=WIDTH)
    _, define, tolerance, label = WAYS[way]
    denoiser.train()  # so that bitsandbytes does not rearrange 4 bits on this CPU; there is no dropout
    base = output(denoiser, given)
    names = add_adapter(denoiser, spec_for("flux"), "content")
    assert torch.equal(output(denoiser, given), base)
    for name in names:
        original: Any = plain.get_submodule(name)
        expected, layer = define(original.weight.detach()), denoiser.get_submodule(name)
        dense = dense_weight(layer, name).double()
        assert float((dense - expected).norm() / expected.norm()) < tolerance
        Q = make_basis(dense, 6).vectors
        assert principal_angle(layer.lora_B["content"].weight, Q) < 0.01
    assert torch.equal(output(denoiser, given), base)  # reading the weights changed nothing
    loss = run(denoiser, given).square().mean()
    loss.backward()
    gradients = [parameter.grad for parameter in trainable_parameters(denoiser, "content").values()]
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > len(names) * 0.6
    shake(denoiser, "content")
    assert not torch.equal(output(denoiser, given), base)
    with adapters_disabled(denoiser):
        assert torch.equal(output(denoiser, given), base)
    adapter = adapter_of(denoiser, "content")
    assert adapter.header is not None
    assert all(value.startswith(label) for value in adapter.header.weight_hashes.values())
    assert base_hash(denoiser, names) == adapter.header.base_hash == base_hash(quantized(way), names)
    with pytest.warns(QrloraWarning, match="could not be verified"):
        attach_adapter(plain, adapter, "content")


@pytest.mark.parametrize("name", ["Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "BF16"])
def test_gguf_blocks_are_unpacked_as_the_gguf_package_does(name: str) -> None:
    width = gguf.GGML_QUANT_SIZES[kind(name)][0] * 2
    rows = gguf.quants.quant_shape_to_byte_shape((8, width), kind(name))
    # Small bytes, so that the half-precision scales among them are finite.
    packed = np.random.default_rng(0).integers(0, 60, rows).astype(np.uint8)
    layer = GGUFLinear(width, 8, compute_dtype=torch.float32)
    layer.weight = GGUFParameter(torch.from_numpy(packed), quant_type=kind(name))
    expected = torch.from_numpy(gguf.quants.dequantize(packed, kind(name)))
    # diffusers' layers compute in half precision here.
    assert float((dense_weight(layer, "x").float() - expected).norm() / expected.norm()) < 1e-3


def test_what_bitsandbytes_rearranges_for_the_cpu_is_read_and_not_trained_on() -> None:
    """With AVX512-BF16 it does so at the first forward without gradients, for a kernel that has no backward."""
    layer: Any = four_bits(nn.Linear(128, 64))
    before = dense_weight(layer, "x")
    functional: Any = bnb.functional
    packed, state = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    bytes_before = layer.weight.data.clone()
    torch.testing.assert_close(dense_weight(layer, "x"), before, rtol=2**-8, atol=0)  # its scales become bf16
    assert torch.equal(layer.weight.data, bytes_before)
    denoiser = quantized("nf4")
    swapped: Any = denoiser.transformer_blocks[0].ff.net[2]
    swapped.weight.data, swapped.weight.quant_state = functional._convert_weight_packed_for_cpu(
        swapped.weight.data, swapped.weight.quant_state
    )
    with pytest.raises(QrloraError, match=r"transformer_blocks\.0\.ff\.net\.2 was rearranged by bitsandbytes"):
        add_adapter(denoiser, spec_for("flux"), "content")


class Unknown(nn.Parameter):
    """A packed weight of a tool that nobody has told us of."""


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False), r"Parameter \(torch.uint8\)"),
        (nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False), r"Parameter \(torch.float8"),
        (Unknown(torch.ones(4, 4)), r"type Unknown"),
        (bnb.nn.Params4bit(torch.ones(4, 64), quant_type="nf4"), "not quantised yet"),
        (bnb.nn.Int8Params(torch.ones(4, 64), requires_grad=False), "not quantised yet"),
        (bnb.nn.Int8Params(torch.ones(4, 64, dtype=torch.int8), requires_grad=False), "without its scales"),
        (GGUFParameter(torch.zeros(4, 66, dtype=torch.uint8), quant_type=kind("IQ2_XXS")), "type IQ2_XXS, which"),
    ],
)
def test_what_nobody_knows_is_refused(weight: Any, message: str) -> None:
    layer: Any = bnb.nn.Linear8bitLt(4, 4) if "Int8" in type(weight).__name__ else nn.Linear(4, 4)
    layer.weight = weight
    with pytest.raises(QrloraError, match=rf"blocks\.0 .*{message}"):
        dense_weight(layer, "blocks.0")


def test_an_unknown_torchao_packing_is_refused() -> None:
    layer = by_torchao(ao.IntxWeightOnlyConfig(weight_dtype=torch.int4))(nn.Linear(64, 64))
    with pytest.raises(QrloraError, match=r"x has a packed weight of type IntxUnpackedToInt8Tensor"):
        dense_weight(layer, "x")
