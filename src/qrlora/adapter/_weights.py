"""The base weights: which layers can be adapted, dense views of them, and hashes to know them again."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qrlora.adapter._packed import packing, unpacked
from qrlora.basis import weight_hash
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import CLIP_STEM, same_weight

_DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NARROWER = {
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
}


def base_layer(module: nn.Module) -> nn.Module:
    """The layer itself, without peft's wrapping."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def base_weight(module: nn.Module) -> Tensor:
    """The layer's weight as it is stored."""
    return cast(Tensor, base_layer(module).weight)


def path_stem(model: nn.Module) -> str:
    """What the paths of a model's layers begin with in adapters, beyond its own module paths.

    transformers 5 has flattened `CLIPTextModel`, whose layers every tool names with `text_model.` at the beginning.
    """
    flattened = type(model).__name__ == "CLIPTextModel" and not hasattr(model, "text_model")
    return CLIP_STEM if flattened else ""


def is_adaptable(module: nn.Module) -> bool:
    return isinstance(base_layer(module), nn.Linear | nn.Conv2d)


def check_adaptable(module: nn.Module, layer: str) -> None:
    """Refuse what a low-rank pair on peft's layers cannot express.

    Raises:
        QrloraError: a grouped, dilated or not zero-padded convolution, or a base weight with adapters fused into it.
    """
    if isinstance(module, LoraLayer) and module.merged:
        raise QrloraError(f"{layer} has adapters fused into its weight; call unfuse_lora first.")
    base = base_layer(module)
    if not isinstance(base, nn.Conv2d):
        return
    if base.groups != 1:
        raise QrloraError(
            f"{layer} is a convolution with {base.groups} groups, which cannot be adapted; leave it out of "
            "target_modules."
        )
    # peft builds its convolutions without these two, and would silently compute another one.
    if base.dilation != (1, 1) or base.padding_mode != "zeros":
        raise QrloraError(
            f"{layer} is a convolution with dilation {base.dilation} and padding mode {base.padding_mode!r}, "
            "which peft does not adapt correctly; leave it out of target_modules."
        )


def dense_weight(module: nn.Module, layer: str) -> Tensor:
    """The weight `[out, in]` or `[out, in, kh, kw]` that the layer computes with, dequantised where it is quantised.

    Raises:
        QrloraError: the weight is packed in a way that is not known, or not loaded (meta device).
    """
    base = base_layer(module)
    weight = cast(Tensor, base.weight)
    if weight.is_meta:
        raise QrloraError(
            f"{layer} has no values (meta device); load or un-offload the base model before adding adapters."
        )
    dense = weight.detach() if _is_plain(weight) else unpacked(base, layer)
    expected = (base.out_features, base.in_features) if isinstance(base, nn.Linear) else None
    if expected is not None and tuple(dense.shape) != expected:
        raise QrloraError(f"{layer}: the dequantised weight has shape {list(dense.shape)}, not {list(expected)}.")
    return dense


def layer_hash(module: nn.Module, layer: str, dense: Tensor | None = None) -> str:
    """`label:hash` of a layer's weight, as headers hold it; the label is the dtype, a packing's name before it.

    So a header says from which weights its bases were made: "bfloat16:...", "packed-bitsandbytes.nf4-bfloat16:...".
    `dense` is its `dense_weight`, for whoever has it.
    """
    weight = base_weight(module)
    dense = dense_weight(module, layer) if dense is None else dense
    packed = "" if _is_plain(weight) else f"packed-{packing(weight)}-"
    return f"{packed}{_dtype_name(dense.dtype)}:{weight_hash(dense)}"


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in _DENSE


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hash_weights(modules: Mapping[str, nn.Module], layers: Iterable[str]) -> dict[str, str]:
    return {layer: layer_hash(modules[layer], layer) for layer in layers}


def combined_hash(hashes: Mapping[str, str]) -> str:
    """One hash of all of `hashes`, whatever their order."""
    lines = "".join(f"{layer}={hashes[layer]}\n" for layer in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def check_base(modules: Mapping[str, nn.Module], hashes: Mapping[str, str], label: str) -> None:
    """Refuse a base model whose weights are not those an adapter was made for.

    A base loaded in a wider dtype is rounded before it is compared. One in a narrower dtype, or quantised, cannot be
    compared; that is said in a `QrloraWarning`.

    Raises:
        QrloraError: a weight differs, naming the layer.
    """
    unknown = 0
    for layer, wanted in hashes.items():
        if layer not in modules:
            continue
        same = _same(modules[layer], layer, wanted)
        if same is False:
            raise QrloraError(
                f"{label} was trained on another base model: the weight of {layer} differs; load the base "
                "model named in its header."
            )
        unknown += same is None
    if unknown:
        warnings.warn(
            f"{unknown} of {len(hashes)} base weights are loaded in another precision than {label} was trained "
            "on, so it could not be verified that the base model is the same.",
            QrloraWarning,
            stacklevel=3,
        )


def _same(module: nn.Module, layer: str, wanted: str) -> bool | None:
    same = same_weight(layer_hash(module, layer), wanted)
    weight = base_weight(module)
    if same is None and _is_plain(weight):
        for narrower in _NARROWER.get(weight.dtype, ()):
            if wanted.startswith(f"{_dtype_name(narrower)}:"):
                return wanted == f"{_dtype_name(narrower)}:{weight_hash(weight.detach().to(narrower))}"
    return same
