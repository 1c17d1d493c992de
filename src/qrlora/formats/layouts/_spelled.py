"""The many spellings of one key that kohya's tools, ComfyUI, LyCORIS and OneTrainer write, and what they all mean.

A key is a prefix, the name of a layer (the original code's or diffusers', with dots or underscores) and the name of a
tensor. The lists are those of `model_lora_keys_unet` in ComfyUI's `comfy/lora.py` and of `LoRAAdapter.load` in its
`comfy/weight_adapter/lora.py`.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats._adapter import (
    Adapter,
    Component,
    Header,
    LowRank,
    check_finite,
    check_pair,
    scaled_pair,
)
from qrlora.formats._encoders import EncoderKey, companions_of, together
from qrlora.formats._factors import natural_key
from qrlora.formats._header import read_header
from qrlora.formats._layout import AdapterFile
from qrlora.formats.keys import TABLES, Part, Target
from qrlora.formats.layouts._fused import split

Role = Literal["A", "B", "alpha"]

# Longer prefixes before those they begin with; after one that ends in "_" names have underscores.
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "",
)
SUFFIXES: Mapping[str, Role] = {
    ".lora_up.weight": "B",
    ".lora_down.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.weight": "A",
    ".lora.up.weight": "B",
    ".lora.down.weight": "A",
    "_lora.up.weight": "B",
    "_lora.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B": "B",
    ".lora_A": "A",
    ".alpha": "alpha",
}


@dataclass(frozen=True)
class Spelled:
    """A key taken apart."""

    key: str
    prefix: str
    name: str
    suffix: str
    target: Target
    original: bool
    """Whether the layer's name is the original code's rather than diffusers'."""

    @property
    def role(self) -> Role:
        return SUFFIXES[self.suffix]


def spelled(key: str) -> Spelled | None:
    """The key taken apart, or None where it names no known layer."""
    suffix = next((each for each in SUFFIXES if key.endswith(each)), None)
    if suffix is None:
        return None
    for prefix in PREFIXES:
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix).removesuffix(suffix)
        underscored = prefix.endswith("_")
        for table in TABLES:
            if target := table.by_name(name, underscored=underscored):
                return Spelled(key, prefix, name, suffix, target, True)
        for table in TABLES:
            for path in _diffusers_names(name, suffix):
                if held := table.by_path(path, underscored=underscored):
                    target, place = held
                    alone = Target(target.family, target.component, target.name, (Part(target.parts[place].path),))
                    return Spelled(key, prefix, name, suffix, alone, False)
    return None


def _diffusers_names(name: str, suffix: str) -> Iterator[str]:
    """The name, and what it was in diffusers' days of attention processors (`attn1.processor.to_out_lora.up`)."""
    yield name
    if suffix.startswith("_lora"):
        modern = name.replace(".processor.", ".")
        yield f"{modern}.0" if modern.endswith(".to_out") else modern
    elif ".processor." in name:
        yield name.replace(".processor.", ".")


def named(keys: Iterable[Spelled], encoders: Mapping[str, EncoderKey]) -> dict[str, str]:
    """What each key belongs to: the layers of the denoiser, or the component and layer of a text encoder."""
    layers = {each.key: ", ".join(part.path for part in each.target.parts) for each in keys}
    return layers | {key: each.path for key, each in encoders.items()}


def assemble(file: AdapterFile, keys: Iterable[Spelled], tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter that these keys describe, with every alpha baked in and fused layers taken apart; with those of text
    encoders, however they are spelled.

    Raises:
        QrloraError: a layer or a factor is there twice or missing, two components, values that are not finite.
    """
    own = list(keys)
    encoders = companions_of(file.source, tensors, file.metadata, {}, only=not own)
    return together(_denoiser(file, own, tensors) if own else None, encoders)


def _denoiser(file: AdapterFile, keys: Iterable[Spelled], tensors: Mapping[str, Tensor]) -> Adapter:
    header = read_header(file.source, file.metadata)
    found: dict[str, dict[Role, Spelled]] = {}
    targets: dict[str, Target] = {}
    for each in keys:
        identity = each.target.name if each.original else each.target.parts[0].path
        roles = found.setdefault(identity, {})
        if each.role in roles:
            raise QrloraError(f"{file.source}: {roles[each.role].key} and {each.key} are the same thing twice.")
        roles[each.role] = each
        targets[identity] = each.target
    layers: dict[str, LowRank] = {}
    for identity, roles in found.items():
        pair = _pair(file.source, identity, roles, tensors, header)
        for path, part in split(targets[identity], pair).items():
            if path in layers:
                raise QrloraError(f"{file.source} has {path} twice, once within {identity}.")
            layers[path] = part
    ordered = {path: layers[path] for path in sorted(layers, key=natural_key)}
    if header is not None and header.rank != max(pair.rank for pair in layers.values()):
        # Another tool resized or merged the file, and left the header as it was.
        message = f"{file.source} has a qrlora header of rank {header.rank}, which is not its own; it is ignored."
        warnings.warn(message, QrloraWarning, stacklevel=2)
        header = None
    return Adapter(ordered, header, _component(file.source, targets), source=str(file.source))


def _pair(
    source: Path, identity: str, roles: Mapping[Role, Spelled], tensors: Mapping[str, Tensor], header: Header | None
) -> LowRank:
    if "A" not in roles or "B" not in roles:
        there = next(iter(roles.values())).key
        raise QrloraError(f"{source} has {there}, but not both factors of {identity}; it is incomplete.")
    for each in (roles["A"], roles["B"]):
        check_floating(source, each.key, tensors[each.key])
    pair = LowRank(tensors[roles["B"].key].float(), tensors[roles["A"].key].float())
    label = f"{source}: {identity}"
    check_pair(label, pair)
    if "alpha" not in roles:
        return pair
    alpha = tensors[roles["alpha"].key]
    check_floating(source, roles["alpha"].key, alpha, integer=True)
    if alpha.numel() != 1:
        raise QrloraError(f"{label} has an alpha of shape {list(alpha.shape)}, which is not one number.")
    return scaled_pair(pair, float(alpha) / pair.rank, header)


def check_floating(source: Path, key: str, tensor: Tensor, *, integer: bool = False) -> None:
    """Refuse values that are not finite numbers, by their key."""
    if not tensor.is_floating_point() and not (integer and tensor.dtype in (torch.int32, torch.int64)):
        raise QrloraError(f"{source}: {key} has dtype {tensor.dtype}; the factors of a LoRA are floating point.")
    check_finite(f"{source}: {key}", tensor)


def _component(source: Path, targets: Mapping[str, Target]) -> Component:
    components: dict[Component, str] = {target.component: name for name, target in targets.items()}
    if len(components) > 1:
        raise QrloraError(f"{source} holds both {' and '.join(components.values())}; an adapter has one component.")
    return next(iter(components))
