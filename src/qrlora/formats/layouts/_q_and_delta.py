"""`transformer.{layer}.lora.{q,delta_r,base_r}.weight`: keys of the published code, which its fork means otherwise."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from qrlora.basis import Side, is_orthonormal
from qrlora.errors import QrloraError
from qrlora.formats._adapter import Adapter, Header, LowRank, check_pair
from qrlora.formats._factors import natural_key
from qrlora.formats._layout import AdapterFile
from qrlora.formats.layouts._spelled import check_floating

_KEY = re.compile(r"transformer\.(.+)\.lora\.(q|delta_r|base_r)\.weight")
_GATE = re.compile(r"transformer\.(.+)\.gate\.(weight|bias)")
# Layers that the published list adapts and the Stable Diffusion 3 fork's does not.
_FLUX_ALONE = re.compile(r"transformer\.(single_transformer_blocks\.|.*\.ff(_context)?\.)")
_ORTHONORMAL = 2e-2
"""Largest entry of `Q^T Q - 1`; a Q stored in bf16 has about 1e-3."""


def keys_of(file: AdapterFile, *, redundant: bool = True) -> dict[str, str]:
    """Key to layer; base_r only where `redundant`."""
    found = {key: match for key in file.entries if (match := _KEY.fullmatch(key))}
    return {key: match[1] for key, match in found.items() if redundant or match[2] != "base_r"}


def gates_of(file: AdapterFile) -> dict[str, str]:
    """Key to layer of the gates of Freq-MoE adapters."""
    return {key: match[1] for key in file.entries if (match := _GATE.fullmatch(key))}


def adapts_flux(file: AdapterFile) -> bool:
    """Whether a layer is of the published FLUX list and not of the fork's list for Stable Diffusion 3."""
    return any(_FLUX_ALONE.match(key) for key in keys_of(file))


def residuals_of(file: AdapterFile) -> list[str]:
    """Keys of `W - s Q R`, which the published code saves as a file of its own."""
    return [key for key in file.entries if key.endswith(".residual.weight")]


def assemble(file: AdapterFile, tensors: Mapping[str, Tensor], basis: str, lora_alpha: float | None) -> Adapter:
    """The adapter whose frozen factor is `q` and whose trained one is `delta_r`, times `lora_alpha / rank`.

    For qr and svd, q is lora_B `[out, r]` and delta_r lora_A `[r, in]`. For ica, q is the mixing matrix `[in, r]` and
    delta_r belongs to the sources `[out, r]`, or, in the second version, q is the sources `[out, r]` and delta_r
    belongs to the mixing matrix, `[r, in]`; the shapes tell.

    Raises:
        QrloraError: a factor is missing, the shapes or a q without orthonormal columns contradict `basis`.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, layer in keys_of(file).items():
        part = key.removesuffix(".weight").rpartition(".")[2]
        check_floating(file.source, key, tensors[key])
        found.setdefault(layer, {})[part] = tensors[key].float()
    layers: dict[str, LowRank] = {}
    sides: dict[Side, str] = {}
    for layer in sorted(found, key=natural_key):
        label = f"{file.source}: {layer}"
        for part in ("q", "delta_r"):
            if part not in found[layer]:
                raise QrloraError(f"{label}.lora.{part}.weight is missing; the file is incomplete.")
        pair, side = _pair(label, found[layer]["q"], found[layer]["delta_r"], basis)
        sides[side] = layer
        scale = 1.0 if lora_alpha is None else lora_alpha / pair.rank
        layers[layer] = LowRank(pair.B, pair.A * scale) if side == "output" else LowRank(pair.B * scale, pair.A)
    if len(sides) > 1:
        raise QrloraError(f"{file.source} has q on the input side of {sides['input']}, but not of {sides['output']}.")
    side = next(iter(sides))
    rank = max(pair.rank for pair in layers.values())
    header = Header(basis=basis, side=side, mask=_mask(layers, side), rank=rank, lora_alpha=lora_alpha or rank)
    return Adapter(layers, header, "transformer", source=str(file.source))


def with_gates(file: AdapterFile, tensors: Mapping[str, Tensor], adapter: Adapter, top_k: int | None) -> Adapter:
    """A Freq-MoE adapter, by the names that `qrlora.adapter.forms.gated` has for its tensors.

    Raises:
        QrloraError: a layer without a gate, or a gate that does not fit its layer or `top_k`.
    """
    own: dict[str, dict[str, Tensor]] = {layer: {} for layer in adapter.layers}
    for key, layer in gates_of(file).items():
        check_floating(file.source, key, tensors[key])
        if layer not in own:
            raise QrloraError(f"{file.source} has {key}, but no lora.q of that layer; the file is incomplete.")
        own[layer]["gate_" + key.rpartition(".")[2]] = tensors[key].float()
    for layer, parts in own.items():
        pair, gate = adapter.layers[layer], parts.get("gate_weight")
        if gate is None:
            raise QrloraError(f"{file.source}: transformer.{layer}.gate.weight is missing; the file is incomplete.")
        experts = gate.shape[0]
        bias = parts.setdefault("gate_bias", gate.new_zeros(experts))
        fits = gate.ndim == 2 and gate.shape[1] == pair.A.shape[1] and bias.shape == (experts,)
        if not fits or pair.rank % experts or (top_k is not None and not 1 <= top_k <= experts):
            chosen = "" if top_k is None else f" with top_k {top_k}"
            raise QrloraError(
                f"{file.source}: {layer} has a gate {list(gate.shape)} and bias {list(bias.shape)}, which do not fit "
                f"rank {pair.rank} on {pair.A.shape[1]} inputs{chosen}; a gate is [experts, in], with experts that "
                "divide the rank."
            )
        if top_k is not None:
            parts["top_k"] = torch.ones(top_k)
    assert adapter.header is not None  # `assemble` made one
    header = adapter.header.model_copy(update={"form": "gated", "mask": "full"})
    return replace(adapter, header=header, own=own)


def _pair(label: str, q: Tensor, delta: Tensor, basis: str) -> tuple[LowRank, Side]:
    if q.ndim != 2 or delta.ndim != 2:
        raise QrloraError(f"{label} has q {list(q.shape)} and delta_r {list(delta.shape)}, which are no matrices.")
    output, inner = q.shape[1] == delta.shape[0], q.shape[1] == delta.shape[1]
    if basis == "ica" and inner:
        if output:
            raise QrloraError(f"{label} has a square delta_r {list(delta.shape)}, so the side of q cannot be told.")
        return LowRank(delta, q.T.contiguous()), "input"
    if not output:
        raise QrloraError(
            f"{label} has q {list(q.shape)} and delta_r {list(delta.shape)}, which is not what basis {basis} leaves; "
            "was it trained with another one (svd, ica, moe)?"
        )
    pair = LowRank(q, delta)
    check_pair(label, pair)
    if is_orthonormal(basis):
        gram = q.T @ q
        if not bool((gram - torch.eye(len(gram))).abs().max() < _ORTHONORMAL):
            raise QrloraError(
                f"{label} has a q without orthonormal columns, which is not what basis {basis} leaves; was it trained "
                "with another one (ica, moe)?"
            )
    return pair, "output"


def _mask(layers: Mapping[str, LowRank], side: Side) -> Literal["full", "upper"]:
    """Whether every trained factor is upper triangular, as the published default trains it."""
    if side == "input":
        return "full"
    return "upper" if all(torch.equal(pair.A, pair.A.triu()) for pair in layers.values()) else "full"
