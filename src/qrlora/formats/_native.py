"""The native file: exactly what diffusers writes, plus our own header key, which stock loaders ignore."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._adapter import (
    DENOISERS,
    DORA,
    MAGNITUDE,
    TEXT_ENCODERS,
    Adapter,
    Component,
    Header,
    SaveDtype,
)
from qrlora.formats._encoders import STEM, companions_of, encoder_key, together
from qrlora.formats._factors import layers_of
from qrlora.formats._header import header_metadata, json_object, read_header, widest
from qrlora.formats._later import Later
from qrlora.formats._safetensors import read_safetensors
from qrlora.formats._saving import cast_to_save, checked_path, stored_pairs
from qrlora.formats._write_safetensors import MetadataLater, write_safetensors

LORA_KEY = "lora_adapter_metadata"


def write_native(
    adapter: Adapter,
    path: str | Path,
    *,
    save_dtype: SaveDtype = "fp32",
    header: Callable[[], Header | None] | None = None,
) -> Path:
    """Write one `.safetensors` file that stock diffusers, ComfyUI and kohya's tools open.

    Keys are `{component}.{layer}.lora_A.weight` and `lora_B.weight`; alpha equals the rank, so the scale is 1. The
    header holds diffusers' own `lora_adapter_metadata` and, under `qrlora`, `adapter.header` as JSON. DoRA's magnitudes
    lie beside the factors, as diffusers has them. Companions are written the same way, each by its component's name.

    Args:
        adapter: low-rank, or DoRA.
        path: the file.
        save_dtype: "fp32" or "bf16".
        header: asked for when all layers were written, and written instead of the adapter's own, from which it may
            differ in the norms of what was merged.

    Raises:
        QrloraError: an adapter of a form that no other tool knows, a value that is not finite (nothing is written), or
            the file cannot be written.
    """
    if adapter.form != DORA:
        adapter.check_low_rank("written for other tools")
    target = checked_path(path)
    tensors: dict[str, Tensor | Later] = {}
    config: dict[str, Any] = {}
    for component, part in adapter.components.items():
        tensors |= stored_pairs(part.layers, partial(_keys, f"{component}."), save_dtype)
        for key, tensor in magnitudes(part, save_dtype).items():
            tensors[f"{component}.{key}"] = tensor
        config |= {f"{component}.{key}": value for key, value in lora_config(part).items()}
    texts = {"format": "pt", LORA_KEY: json.dumps(config, indent=2, sort_keys=True)}

    def metadata() -> dict[str, str]:
        return texts | header_metadata(adapter if header is None else replace(adapter, header=header()))

    room = texts | header_metadata(replace(adapter, header=widest(adapter.header)))
    return write_safetensors(target, tensors, MetadataLater(room, metadata))


def _keys(prefix: str, name: str) -> tuple[str, str]:
    return f"{prefix}{name}.lora_A.weight", f"{prefix}{name}.lora_B.weight"


def read_native(path: str | Path) -> Adapter:
    """Read a diffusers LoRA file, ours or another tool's; any alpha is baked into the factors.

    Raises:
        QrloraError: truncated, not finite, of another layout, with unknown keys: always naming the key.
    """
    source = Path(path)
    return adapter_from(source, *read_safetensors(source))


def adapter_from(source: Path, tensors: Mapping[str, Tensor | Later], metadata: Mapping[str, str]) -> Adapter:
    """The adapter that a diffusers file's tensors and metadata are; see `read_native`."""
    config: dict[str, Any] = {}
    if LORA_KEY in metadata:
        config = json_object(source, metadata[LORA_KEY], f"the header key {LORA_KEY}")
    own = {key: tensor for key, tensor in tensors.items() if encoder_key(key) is None}
    encoders = companions_of(source, tensors, metadata, config, only=not own)
    denoiser = None if encoders and not own else _denoiser_from(source, own, config, read_header(source, metadata))
    return together(denoiser, encoders)


def _denoiser_from(
    source: Path, tensors: Mapping[str, Tensor | Later], config: Mapping[str, Any], header: Header | None
) -> Adapter:
    component = component_in(source, tensors)
    stripped = {key.removeprefix(f"{component}."): tensor for key, tensor in tensors.items()}
    settings = {key.removeprefix(f"{component}."): value for key, value in config.items()}
    layers, own = layers_of(source, stripped, settings, header)
    return Adapter(layers, header, component, own, source=str(source))


def magnitudes(adapter: Adapter, save_dtype: SaveDtype) -> dict[str, Tensor]:
    """DoRA's tensors by `{layer}.lora_magnitude_vector`; none for other adapters."""
    if adapter.form != DORA:
        return {}
    return {f"{name}.{MAGNITUDE}": cast_to_save(name, own[MAGNITUDE], save_dtype) for name, own in adapter.own.items()}


def lora_config(adapter: Adapter) -> dict[str, Any]:
    """The plain `LoraConfig` fields of an adapter whose scale is 1, ranks that differ given by pattern.

    The layers of text encoders are named by the ends of their paths, which all versions of transformers agree on.
    """
    encoder = adapter.component in TEXT_ENCODERS
    ranks = {name.removeprefix(STEM) if encoder else name: pair.rank for name, pair in adapter.shapes.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    start = "" if encoder else "^"
    pattern = {f"{start}{re.escape(name)}": other for name, other in ranks.items() if other != rank}
    # Whatever an adapter was made by, nothing is initialised again where it is loaded.
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": adapter.form == DORA,
        "use_rslora": False,
    }


def component_in(source: Path, keys: Iterable[str]) -> Component:
    """The denoiser that a file's keys begin with.

    Raises:
        QrloraError: there are no keys, those of two denoisers, or others.
    """
    found: dict[Component, str] = {}
    for key in keys:
        for component in DENOISERS:
            if key.startswith(f"{component}."):
                found[component] = key
                break
        else:
            raise QrloraError(
                f"{source}: {key} does not start with transformer. or unet., so this is not a diffusers LoRA of a "
                "denoiser; convert the file, or drop the key, first."
            )
    if not found:
        raise QrloraError(f"{source} holds no tensors.")
    if len(found) > 1:
        raise QrloraError(f"{source} holds both {' and '.join(found.values())}; an adapter belongs to one component.")
    return next(iter(found))
