"""An adapter on a denoiser as data, and as a file."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qrlora.adapter._peft import component_of, held, lora_layers, record_of
from qrlora.adapter._variant import FormVariant
from qrlora.adapter._weights import combined_hash, hash_weights
from qrlora.adapter.forms import Start, form_named
from qrlora.adapter.forms._form import FACTORS, upper_triangle
from qrlora.adapter.targets import adaptable_layers
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, Header, LowRank, SaveDtype


def adapter_of(
    denoiser: nn.Module,
    adapter_name: str,
    *,
    base_model: str | None = None,
    trigger_words: Iterable[str] = (),
    training: Mapping[str, Any] | None = None,
) -> Adapter:
    """Copy an adapter off a denoiser, with its scale (`lora_alpha / rank`) baked in.

    The weight given by `set_adapters` is not part of it.

    Args:
        denoiser: the denoiser that carries it.
        adapter_name: its name there.
        base_model: id or folder of the base model, for the header; what the header already says where None.
        trigger_words: words the adapter was trained on, for the header; likewise.
        training: the resolved training configuration, for the header; likewise.

    Raises:
        QrloraError: no such adapter, one of another tool that is more than plain LoRA, or masked entries that are not
            zero.
    """
    layers = lora_layers(denoiser, adapter_name)
    record = record_of(denoiser, adapter_name)
    header, form = record.header, form_named(record.form)
    factors: dict[str, LowRank] = {}
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensors in held(denoiser, adapter_name).items():
        _check_ours(layers[name], name, adapter_name)
        exported = _copied(form.export(tensors))
        factors[name] = exported.pair
        if exported.own:
            own[name] = dict(exported.own)
        _check_mask(header, factors[name], name)
    if header is None:
        hashes = hash_weights(adaptable_layers(denoiser), layers)
        rank = max(pair.rank for pair in factors.values())
        header = Header(rank=rank, lora_alpha=rank, base_hash=combined_hash(hashes), weight_hashes=hashes)
    given: dict[str, Any] = {"base_model": base_model, "trigger_words": list(trigger_words)}
    given["training"] = dict(training) if training is not None else None
    header = Header.model_validate(header.model_dump() | {key: value for key, value in given.items() if value})
    return Adapter(factors, header, component_of(denoiser), own=own)


def save_adapter(
    denoiser: nn.Module,
    adapter_name: str,
    path: str | Path,
    *,
    base_model: str | None = None,
    trigger_words: Iterable[str] = (),
    training: Mapping[str, Any] | None = None,
    save_dtype: SaveDtype = "fp32",
    coefficients_only: bool = False,
) -> Path:
    """Write an adapter of a denoiser to a file: a vanilla diffusers LoRA with provenance; see `adapter_of`.

    Args:
        path: of the file, ending in .safetensors; it is replaced only once the new one is complete.
        save_dtype: "fp32" or "bf16".
        coefficients_only: leave the basis out (half the size); loading then needs the base model, and stock tools
            cannot open it.

    Raises:
        QrloraError: what `adapter_of` raises, values that are not finite, or a file that cannot be written.
    """
    adapter = adapter_of(denoiser, adapter_name, base_model=base_model, trigger_words=trigger_words, training=training)
    return adapter.save(path, save_dtype=save_dtype, coefficients_only=coefficients_only)


def base_hash(denoiser: nn.Module, layers: Iterable[str]) -> str:
    """One hash over the base weights of `layers`, as headers hold it.

    Raises:
        QrloraError: a layer that is not there, or a packed weight of unknown type.
    """
    modules = adaptable_layers(denoiser)
    wanted = list(layers)
    for layer in wanted:
        if layer not in modules:
            raise QrloraError(f"{type(denoiser).__name__} has no layer {layer} that can be adapted.")
    return combined_hash(hash_weights(modules, wanted))


def kept_tensors(denoiser: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Frozen tensors that an exact resume needs and the adapter's file does not hold to the last bit.

    Returns:
        By `{layer}.lora_A.weight`, `{layer}.lora_B.weight` or `{layer}.{key}`, as they are (not copies); empty for
        coefficients and plain LoRA.

    Raises:
        QrloraError: no such adapter.
    """
    tensors = held(denoiser, adapter_name)
    form = form_named(record_of(denoiser, adapter_name).form)
    found: dict[str, Tensor] = {}
    for name in tensors:
        for key, tensor in form.kept(tensors[name]).items():
            found[f"{name}.{key}.weight" if key in FACTORS else f"{name}.{key}"] = tensor.detach()
    return found


def restore_kept(denoiser: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `kept_tensors` gave, to the last bit.

    Raises:
        QrloraError: no such adapter, or these are not its tensors.
    """
    kept = kept_tensors(denoiser, adapter_name)
    odd = sorted(kept.keys() ^ tensors.keys())
    if odd:
        raise QrloraError(f"{odd[0]} is in the adapter or in what was kept of it only; they do not belong together.")
    for key, tensor in kept.items():
        if tensor.shape != tensors[key].shape:
            raise QrloraError(f"{key} has shape {list(tensors[key].shape)}, but here {list(tensor.shape)}.")
        tensor.copy_(tensors[key])


def _check_ours(layer: LoraLayer, name: str, adapter_name: str) -> None:
    variant = layer.lora_variant.get(adapter_name)
    if (variant is not None and not isinstance(variant, FormVariant)) or layer.lora_bias.get(adapter_name):
        raise QrloraError(
            f"adapter {adapter_name!r} is more than a plain LoRA at {name}, so it cannot be saved as one."
        )


def _copied(start: Start) -> Start:
    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float32, copy=True)

    pair = LowRank(copied(start.pair.B), copied(start.pair.A))
    return Start(pair, {key: copied(tensor) for key, tensor in start.own.items()})


def _check_mask(header: Header | None, pair: LowRank, name: str) -> None:
    """A mask lost on the way (hooks do not survive every copy) must not go unnoticed."""
    if header is None or header.mask != "upper":
        return
    masked = upper_triangle(pair.A, "lora_A") if header.side == "output" else upper_triangle(pair.B, "lora_B")
    if not torch.equal(masked, pair.A if header.side == "output" else pair.B):
        raise QrloraError(
            f"{name} has values outside the upper triangle, though its adapter is masked; train the parameters that "
            "trainable_parameters returns."
        )
