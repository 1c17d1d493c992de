"""The native file: exactly what diffusers writes, plus our own header key, which stock loaders ignore."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._adapter import (
    DORA,
    FORMAT_VERSION,
    MAGNITUDE,
    Adapter,
    Component,
    Header,
    LowRank,
    SaveDtype,
    check_finite,
    check_pair,
)
from qrlora.formats._safetensors import read_safetensors, write_safetensors

HEADER_KEY = "qrlora"
LORA_KEY = "lora_adapter_metadata"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_COMPONENTS: tuple[Component, ...] = ("transformer", "unet")
# Initialisations after which `W + scale * B A` is what the file means; the others (pissa, olora, ...) also change the
# base.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
_MEANS_MORE = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "layer_replication",
)


def write_native(adapter: Adapter, path: str | Path, *, save_dtype: SaveDtype = "fp32") -> Path:
    """Write one `.safetensors` file that stock diffusers, ComfyUI and kohya's tools open.

    Keys are `{component}.{layer}.lora_A.weight` and `lora_B.weight`; alpha equals the rank, so the scale is 1. The
    header holds diffusers' own `lora_adapter_metadata` and, under `qrlora`, `adapter.header` as JSON. DoRA's magnitudes
    lie beside the factors, as diffusers has them.

    Raises:
        QrloraError: an adapter of a form that no other tool knows, a value that is not finite (nothing is written), or
            the file cannot be written.
    """
    if adapter.form != DORA:
        adapter.check_low_rank("written for other tools")
    target = checked_path(path)
    tensors: dict[str, Tensor] = {}
    for name, pair in adapter.layers.items():
        for factor, tensor in (("lora_A", pair.A), ("lora_B", pair.B)):
            tensors[f"{adapter.component}.{name}.{factor}.weight"] = cast_to_save(name, tensor, save_dtype)
    for key, tensor in magnitudes(adapter, save_dtype).items():
        tensors[f"{adapter.component}.{key}"] = tensor
    config = {f"{adapter.component}.{key}": value for key, value in lora_config(adapter).items()}
    metadata = {"format": "pt", LORA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    return write_safetensors(target, tensors, metadata | header_metadata(adapter.header))


def read_native(path: str | Path) -> Adapter:
    """Read a diffusers LoRA file, ours or another tool's; any alpha is baked into the factors.

    Raises:
        QrloraError: truncated, not finite, of another layout, with unknown keys: always naming the key.
    """
    source = Path(path)
    return adapter_from(source, *read_safetensors(source))


def adapter_from(source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """The adapter that a diffusers file's tensors and metadata are; see `read_native`."""
    header = read_header(source, metadata)
    component = component_in(source, tensors)
    stripped = {key.removeprefix(f"{component}."): tensor for key, tensor in tensors.items()}
    config: dict[str, Any] = {}
    if LORA_KEY in metadata:
        packed = json_object(source, metadata[LORA_KEY], f"the header key {LORA_KEY}")
        config = {key.removeprefix(f"{component}."): value for key, value in packed.items()}
    layers, own = layers_of(source, stripped, config, header)
    return Adapter(layers, header, component, own, source=str(source))


def magnitudes(adapter: Adapter, save_dtype: SaveDtype) -> dict[str, Tensor]:
    """DoRA's tensors by `{layer}.lora_magnitude_vector`; none for other adapters."""
    if adapter.form != DORA:
        return {}
    return {f"{name}.{MAGNITUDE}": cast_to_save(name, own[MAGNITUDE], save_dtype) for name, own in adapter.own.items()}


def checked_path(path: str | Path) -> Path:
    target = Path(path)
    if target.suffix != ".safetensors":
        raise QrloraError(f"{target}: an adapter file's name ends in .safetensors.")
    return target


def cast_to_save(name: str, tensor: Tensor, save_dtype: SaveDtype) -> Tensor:
    if save_dtype not in _DTYPES:
        raise QrloraError(f"save_dtype {save_dtype!r} is not known; use one of {', '.join(_DTYPES)}.")
    stored = tensor.detach().to("cpu", _DTYPES[save_dtype])
    check_finite(name, stored)
    return stored


def lora_config(adapter: Adapter) -> dict[str, Any]:
    """The plain `LoraConfig` fields of an adapter whose scale is 1, ranks that differ given by pattern."""
    ranks = {name: pair.rank for name, pair in adapter.layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": other for name, other in ranks.items() if other != rank}
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


def header_metadata(header: Header | None) -> dict[str, str]:
    return {} if header is None else {HEADER_KEY: json.dumps(header.model_dump(mode="json"), sort_keys=True)}


def read_header(source: Path, metadata: Mapping[str, str]) -> Header | None:
    if HEADER_KEY not in metadata:
        return None
    values = json_object(source, metadata[HEADER_KEY], f"the header key {HEADER_KEY}")
    version = values.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise QrloraError(
            f"{source} has format version {version}; this qrlora reads up to {FORMAT_VERSION}: update qrlora."
        )
    try:
        return Header.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise QrloraError(f"{source}: the header's {where or 'content'} is not valid: {first['msg']}.") from error


def json_object(source: Path, text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QrloraError(f"{source}: {what} is not JSON.") from error
    if not isinstance(value, dict):
        raise QrloraError(f"{source}: {what} is not a JSON object.")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise QrloraError(f"{source}: {what} has half a character (a lone surrogate), which is no text.") from error
    return cast(dict[str, Any], value)


def layers_of(
    source: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], header: Header | None
) -> tuple[dict[str, LowRank], dict[str, dict[str, Tensor]]]:
    """Pair up `{layer}.lora_A.weight` and `{layer}.lora_B.weight`, in fp32, with the scale of `config` baked in.

    Returns:
        The pairs by layer, and DoRA's magnitudes by layer and key.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, found, factor = _split(key)
        if not found:
            raise QrloraError(
                f"{source}: {key} is not a key of a LoRA as diffusers or peft write it "
                "(LAYER.lora_A.weight, LAYER.lora_B.weight); convert the file first."
            )
        if not tensor.is_floating_point():
            raise QrloraError(f"{source}: {key} has dtype {tensor.dtype}; the factors of a LoRA are floating point.")
        check_finite(f"{source}: {key}", tensor)
        factors.setdefault(name, {})[factor] = tensor.float()
    own = _magnitudes_of(source, factors, config)
    _check_plain(source, {**config, "use_dora": False} if own else config)
    layers: dict[str, LowRank] = {}
    for name in sorted(factors, key=natural_key):
        pair = factors[name]
        for factor in ("lora_A", "lora_B"):
            if factor not in pair:
                raise QrloraError(f"{source}: {name}.{factor}.weight is missing while its other factor is there.")
        layers[name] = _with_scale(
            f"{source}: {name}", LowRank(pair["lora_B"], pair["lora_A"]), name, pair, config, header
        )
    return layers, own


def _magnitudes_of(
    source: Path, factors: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """DoRA's tensors; there for every layer or for none."""
    own = {name: {MAGNITUDE: parts[MAGNITUDE]} for name, parts in factors.items() if MAGNITUDE in parts}
    if not own and not config.get("use_dora"):
        return {}
    for name, parts in factors.items():
        if name not in own:
            raise QrloraError(f"{source} uses peft's use_dora, but {name}.{MAGNITUDE} is missing.")
        size = own[name][MAGNITUDE].numel()
        if "lora_B" in parts and size != parts["lora_B"].shape[0]:
            raise QrloraError(f"{source}: {name}.{MAGNITUDE} has {size} values, which does not fit its lora_B.")
    return own


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that keeps block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _split(key: str) -> tuple[str, bool, str]:
    match = re.fullmatch(rf"(.+)\.(?:(lora_[AB])\.weight|(alpha)|({MAGNITUDE})(?:\.weight)?)", key)
    if match is None:
        return "", False, ""
    return match[1], True, match[2] or match[3] or match[4]


def _with_scale(
    label: str, pair: LowRank, name: str, found: Mapping[str, Tensor], config: Mapping[str, Any], header: Header | None
) -> LowRank:
    check_pair(label, pair)
    rank = pair.rank
    try:
        alpha = (
            float(found["alpha"]) if "alpha" in found else _pattern(config, "alpha_pattern", "lora_alpha", name, rank)
        )
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise QrloraError(f"{label} has an alpha, or an alpha_pattern, that cannot be used: {error}.") from error
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    if not math.isfinite(scale):
        raise QrloraError(f"{label} has the alpha {alpha}, which is not a finite number.")
    if scale == 1:
        return pair
    if header is not None and header.side == "output":
        return LowRank(pair.B, pair.A * scale)
    return LowRank(pair.B * scale, pair.A)


def _pattern(config: Mapping[str, Any], patterns: str, default: str, name: str, otherwise: float) -> float:
    """A layer's value by peft's own rule: the first pattern that matches the end of the path, else the default.

    Only names of layers, as tools write them, are taken for patterns: a stranger's expression may never end.
    """
    for pattern, value in cast(dict[str, float], config.get(patterns) or {}).items():
        whole, path = pattern.startswith("^"), pattern.removeprefix("^").removesuffix("$")
        path = re.sub(r"\\([^\w\s])", r"\1", path)
        if not re.fullmatch(r"[\w.-]+", path):
            raise ValueError(f"{patterns} has {pattern[:80]!r}, which is not the name of a layer")
        if name == path or (not whole and name.endswith(f".{path}")):
            return float(value)
    return float(config.get(default, otherwise))


def _check_plain(source: Path, config: Mapping[str, Any]) -> None:
    for key in _MEANS_MORE:
        if config.get(key):
            raise QrloraError(
                f"{source} uses peft's {key}, so it is more than W + B A; merge it down to a plain LoRA first."
            )
    if config.get("bias", "none") != "none":
        raise QrloraError(f"{source} also trained biases (bias={config['bias']!r}), which cannot be kept.")
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        raise QrloraError(
            f"{source} says init_lora_weights={config['init_lora_weights']!r}, so it belongs to a changed base; "
            "convert it to a plain LoRA with peft's path_initial_model_for_weight_conversion first."
        )


def component_in(source: Path, tensors: Mapping[str, Tensor]) -> Component:
    if not tensors:
        raise QrloraError(f"{source} holds no tensors.")
    found: dict[Component, str] = {}
    for key in tensors:
        for component in _COMPONENTS:
            if key.startswith(f"{component}."):
                found[component] = key
                break
        else:
            raise QrloraError(
                f"{source}: {key} does not start with transformer. or unet., so this is not a diffusers LoRA of a "
                "denoiser; convert the file, or drop the key, first."
            )
    if len(found) > 1:
        raise QrloraError(f"{source} holds both {' and '.join(found.values())}; an adapter belongs to one component.")
    return next(iter(found))
