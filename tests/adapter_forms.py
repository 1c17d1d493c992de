"""Adapters of every form on tiny denoisers."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qrlora.adapter import AdapterSpec, add_adapter, trainable_parameters
from tests.tiny_models import tiny

FORMS: dict[str, dict[str, Any]] = {
    "both": {"form": "both", "lora_alpha": 6.0},
    "both-input": {"form": "both", "side": "input", "basis": "svd"},
    "pissa": {"basis": "pissa", "lora_alpha": 6.0},
    "olora": {"basis": "olora"},
    "core": {"form": "core", "basis": "svd", "lora_alpha": 6.0},
    "core-input": {"form": "core", "basis": "qr", "side": "input"},
    "core-random": {"form": "core", "basis": "random"},
    "dora": {"basis": "dora", "lora_alpha": 6.0},
}
FEW = {"flux": ["attn.to_q", "ff.net.2"], "unet": ["attn2.to_k", "conv_shortcut", "downsamplers.0.conv"]}


def spec_for(name: str, kind: str = "flux", **fields: Any) -> AdapterSpec:
    return AdapterSpec(**({"rank": 4, "target_modules": FEW[kind]} | FORMS[name] | fields))


def shake(denoiser: nn.Module, size: float = 0.05, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters(denoiser, "content").values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * size


def with_form(name: str, kind: str = "flux", **fields: Any) -> Any:
    denoiser = tiny(kind)
    add_adapter(denoiser, spec_for(name, kind, **fields), "content")
    return denoiser


def lora_layers(denoiser: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}


def apply(base: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    bias = base.bias.detach().double() if isinstance(base.bias, Tensor) else None
    if isinstance(base, nn.Conv2d):
        return F.conv2d(x.double(), weight.reshape(base.weight.shape), bias, base.stride, base.padding)
    return F.linear(x.double(), weight, bias)


def some_input(base: Any) -> Tensor:
    shape = (2, base.in_channels, 6, 6) if isinstance(base, nn.Conv2d) else (3, base.in_features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
