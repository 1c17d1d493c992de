"""Denoisers quantised while they are loaded, by diffusers' own quantisers.

What lies outside the repeated blocks (embeddings, the last projection) stays as it is: it is small, and all pass it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, cast, get_args

import torch
from accelerate import init_empty_weights
from diffusers.quantizers import auto
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from diffusers.quantizers.quantization_config import BitsAndBytesConfig, TorchAoConfig
from diffusers.quantizers.torchao.torchao_quantizer import TorchAoHfQuantizer
from torch import nn

from qrlora.errors import QrloraError
from qrlora.models._streaming import repeated_blocks

Quantization = Literal["nf4", "int8", "fp8"]
_PACKAGES: dict[Quantization, str] = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}


def check_quantization(kind: str | None) -> None:
    """Refuse a quantisation that is not known or whose package is not installed.

    Raises:
        QrloraError: names the package and how to get it.
    """
    if kind is None:
        return
    if kind not in get_args(Quantization):
        raise QrloraError(f"quantization={kind} is not known; there are {', '.join(get_args(Quantization))}.")
    package = _PACKAGES[cast(Quantization, kind)]
    if find_spec(package) is None:
        raise QrloraError(
            f"quantization: {kind} needs the package {package}, which is not installed; pip install {package}."
        )


def quantized_layers(denoiser: nn.Module) -> list[str]:
    """Paths of the linear layers that are quantised: all of those in the repeated blocks."""
    return [
        f"{block}.{name}"
        for block, module in repeated_blocks(denoiser).items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]


def quantization_config(kind: Quantization, dtype: torch.dtype) -> Any:
    """diffusers' configuration for quantising a denoiser as it is loaded.

    Args:
        kind: nf4 is QLoRA's (arXiv 2305.14314), its scales quantised as well; int8 and fp8 have a scale a row.
        dtype: what is computed in.

    Raises:
        QrloraError: what `check_quantization` raises.
    """
    check_quantization(kind)
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
    import torchao.quantization as torchao

    return TorchAoConfig(torchao.Int8WeightOnlyConfig() if kind == "int8" else torchao.Float8WeightOnlyConfig())


def prepare_for_training(denoiser: nn.Module) -> None:
    """Make quantised layers behave under autocast and with gradients as ordinary ones do.

    bitsandbytes and torchao give back the dtype that comes in, where autocast would give bf16: after the first norm,
    which is fp32 on CUDA, everything would be twice as large. And on a CPU with AVX512-BF16, bitsandbytes would
    rearrange 4-bit weights for a kernel without gradients.
    """
    for name in quantized_layers(denoiser):
        layer: Any = denoiser.get_submodule(name)
        layer.register_forward_pre_hook(_autocast_input)
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _autocast_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x = args[0]
    if not torch.is_autocast_enabled(x.device.type):
        return None
    return (x.to(torch.get_autocast_dtype(x.device.type)), *args[1:])


class _FourBits(BnB4BitDiffusersQuantizer):
    """diffusers' own, which packs weights on `workplace` and keeps them on the CPU.

    The original insists on a GPU and fills it with the whole model, also where the blocks are to stay on the CPU or the
    machine has none; bitsandbytes itself needs neither. And it leaves out layers by the end of their names: to spare
    FLUX's last projection, it would spare those of all single blocks, a seventh of the model.
    """

    workplace = torch.device("cpu")

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        check_quantization("nf4")

    def update_device_map(self, device_map: Any) -> Any:
        return device_map

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any, keep_in_fp32_modules: Any = (), **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            super()._process_model_before_weight_loading(model, device_map, list(keep_in_fp32_modules), **kwargs)
            return
        import bitsandbytes

        config: Any = self.quantization_config
        for name in quantized_layers(model):
            layer = model.get_submodule(name)
            with init_empty_weights():
                packed = bitsandbytes.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    layer.bias is not None,
                    compute_dtype=config.bnb_4bit_compute_dtype,
                    compress_statistics=config.bnb_4bit_use_double_quant,
                    quant_type=config.bnb_4bit_quant_type,
                )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed.requires_grad_(False))
        model.config.quantization_config = config
        model.is_loaded_in_4bit = True

    def create_quantized_param(
        self, model: Any, param_value: Any, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().create_quantized_param(model, param_value, param_name, self.workplace, *args, **kwargs)
        path, _, name = param_name.rpartition(".")
        parameters = model.get_submodule(path)._parameters
        parameters[name] = parameters[name].to("cpu")


class _EightBits(TorchAoHfQuantizer):
    """diffusers' own, which quantises the repeated blocks alone."""

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: Any, **kwargs: Any
    ) -> bool:
        if self.pre_quantized:
            return super().check_if_quantized_param(model, param_value, param_name, state_dict, **kwargs)
        path, _, name = param_name.rpartition(".")
        if not hasattr(self, "_chosen"):
            self._chosen = frozenset(quantized_layers(model))
        return name == "weight" and path in self._chosen


@contextmanager
def own_quantisers(workplace: torch.device) -> Iterator[None]:
    """Within, diffusers quantises by the two above.

    Args:
        workplace: where weights are packed, one at a time, to 4 bits.
    """
    own = {
        "bitsandbytes_4bit": type("FourBits", (_FourBits,), {"workplace": workplace}),
        "torchao": _EightBits,
    }
    before = {name: auto.AUTO_QUANTIZER_MAPPING[name] for name in own}
    auto.AUTO_QUANTIZER_MAPPING.update(own)
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING.update(before)
