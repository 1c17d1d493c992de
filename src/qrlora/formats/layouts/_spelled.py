"""The many spellings of one key that kohya's tools, ComfyUI, LyCORIS and OneTrainer write, and what they all mean.

A key is a prefix, the name of a layer (the original code's or diffusers', with dots or underscores) and the name of a
tensor. The lists are those of `model_lora_keys_unet` in ComfyUI's `comfy/lora.py` and of `LoRAAdapter.load` in its
`comfy/weight_adapter/lora.py`.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
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
from qrlora.formats._safetensors import TensorEntry
from qrlora.formats.keys import FLUX, FLUX2, TABLES, KeyTable, Part, Target, is_flux2
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


def spelled_keys(entries: Mapping[str, TensorEntry], start: str = "") -> list[Spelled]:
    """Those of a file's keys that begin with `start` and name a known layer, taken apart.

    Families share names, some of them for other layers, so a file is read by the names of the one that knows most of
    its keys, and by those of the others where that one has none.
    """
    keys = [key for key in entries if key.startswith(start)]
    found = {table.family: _known(keys, table) for table in TABLES}
    most = max(len(known) for known in found.values())
    candidates = [table for table in TABLES if len(found[table.family]) == most]
    best = candidates[0]
    if FLUX in candidates and FLUX2 in candidates:  # all names are FLUX.1's too, but not all shapes
        best = FLUX2 if _of_flux2(found[FLUX.family], entries) else FLUX
    tables = (best, *(table for table in TABLES if table is not best))
    return [each for key in keys if (each := spelled(key, tables)) is not None]


def _known(keys: Iterable[str], table: KeyTable) -> list[Spelled]:
    return [each for key in keys if (each := spelled(key, (table,))) is not None]


def _of_flux2(keys: Iterable[Spelled], entries: Mapping[str, TensorEntry]) -> bool:
    shapes: dict[str, dict[Role, tuple[int, ...]]] = {}
    for each in keys:
        if each.original:
            shapes.setdefault(each.target.name, {})[each.role] = entries[each.key].shape
    found = [(name, roles["B"][0], roles["A"][-1]) for name, roles in shapes.items() if {"A", "B"} <= roles.keys()]
    return any(is_flux2((rows, columns), name) for name, rows, columns in found)


@lru_cache(maxsize=1 << 16)
def spelled(key: str, tables: tuple[KeyTable, ...] = TABLES) -> Spelled | None:
    """The key taken apart, by the first of the tables that knows it; None where none does."""
    suffix = next((each for each in SUFFIXES if key.endswith(each)), None)
    if suffix is None:
        return None
    for prefix in PREFIXES:
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix).removesuffix(suffix)
        underscored = prefix.endswith("_")
        for table in tables:
            target = table.by_name(name, underscored=underscored)
            if target is not None and target.renamed:
                return Spelled(key, prefix, name, suffix, target, True)
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
