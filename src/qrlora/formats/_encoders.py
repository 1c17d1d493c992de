"""The names that tools give to the layers of CLIP text encoders, and the adapters of these in a file."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats._adapter import TEXT_ENCODERS, Adapter, Component, LowRank, SaveDtype
from qrlora.formats._factors import layers_of
from qrlora.formats._header import read_header
from qrlora.formats._later import Later, had
from qrlora.formats._layers import shapes_of
from qrlora.formats._saving import stored_pairs

STEM = "text_model."
"""What the paths of a CLIP encoder's layers begin with, but for `text_projection`, and in flattened models nothing."""
_KOHYA: Mapping[Component, str] = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
KOHYA_PREFIXES = ("lora_te_", *_KOHYA.values())
"""Prefixes of kohya's tools, which ComfyUI reads too; after them names have underscores."""
_PREFIXES: Mapping[str, Component] = {
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "lora_te_": "text_encoder",
    **{prefix: component for component, prefix in _KOHYA.items()},
}
_SUFFIXES: Mapping[str, Literal["lora_A.weight", "lora_B.weight", "alpha"]] = {
    ".lora_A.weight": "lora_A.weight",
    ".lora_B.weight": "lora_B.weight",
    ".lora_linear_layer.down.weight": "lora_A.weight",
    ".lora_linear_layer.up.weight": "lora_B.weight",
    ".lora.down.weight": "lora_A.weight",
    ".lora.up.weight": "lora_B.weight",
    ".lora_down.weight": "lora_A.weight",
    ".lora_up.weight": "lora_B.weight",
    "_lora.down.weight": "lora_A.weight",
    "_lora.up.weight": "lora_B.weight",
    ".alpha": "alpha",
}
# As diffusers called them in its days of attention processors.
_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_LAYER = re.compile(
    r"(?:text_model[._])?encoder[._]layers[._](0|[1-9][0-9]{0,3})[._]"
    r"(?:self_attn[._]([qkv]_proj|out_proj|to_(?:q|k|v|out))|mlp[._](fc[12]))"
)


@dataclass(frozen=True)
class EncoderKey:
    """A key of a text encoder's layer, taken apart."""

    prefix: str
    layer: str
    """The module path, with `text_model.` at its beginning."""
    part: Literal["lora_A.weight", "lora_B.weight", "alpha"]

    @property
    def component(self) -> Component:
        return _PREFIXES[self.prefix]

    @property
    def path(self) -> str:
        """The layer with its component."""
        return f"{self.component}.{self.layer}"


def encoder_key(key: str) -> EncoderKey | None:
    """The key taken apart, or None where it is of no layer of a CLIP encoder."""
    prefix = next((each for each in _PREFIXES if key.startswith(each)), None)
    suffix = next((each for each in _SUFFIXES if key.endswith(each)), None)
    if prefix is None or suffix is None:
        return None
    name = key.removeprefix(prefix).removesuffix(suffix)
    if name == "text_projection":
        return EncoderKey(prefix, name, _SUFFIXES[suffix])
    found = _LAYER.fullmatch(name)
    if found is None or ("." in name) == prefix.endswith("_"):
        return None
    number, attention, feed_forward = found.groups()
    part = f"self_attn.{_OLD.get(attention, attention)}" if attention else f"mlp.{feed_forward}"
    return EncoderKey(prefix, f"{STEM}encoder.layers.{number}.{part}", _SUFFIXES[suffix])


def encoder_keys(keys: Mapping[str, object]) -> dict[str, EncoderKey]:
    """Those of some keys that belong to text encoders."""
    return {key: found for key in keys if (found := encoder_key(key)) is not None}


def companions_of(
    source: Path,
    tensors: Mapping[str, Tensor | Later],
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
    *,
    only: bool,
) -> dict[Component, Adapter]:
    """The adapters of the text encoders in a file, by component.

    Args:
        source: the file.
        tensors: of any keys; others than those of text encoders are passed over.
        metadata: the file's, with a header for each of ours.
        config: diffusers' `lora_adapter_metadata`, with the component before every key.
        only: nothing else is in the file, so the first of them has the file's own header.

    Raises:
        QrloraError: a key twice or missing, values that are not finite, a configuration that means more than a LoRA.
    """
    found: dict[Component, dict[str, Tensor | Later]] = {}
    for key, each in encoder_keys(tensors).items():
        factors = found.setdefault(each.component, {})
        name = f"{each.layer}.{each.part}"
        if name in factors:
            raise QrloraError(f"{source}: {key} is there twice, in two spellings.")
        # Some tools write whole alphas as integers.
        factors[name] = had(tensors[key]).float() if each.part == "alpha" else tensors[key]
    adapters: dict[Component, Adapter] = {}
    for component in TEXT_ENCODERS:
        if component not in found:
            continue
        header = read_header(source, metadata, None if only and not adapters else component)
        layers, _ = layers_of(source, found[component], _config_of(config, component), header)
        rank = max(pair.rank for pair in shapes_of(layers).values())
        if header is not None and header.rank != rank:
            warnings.warn(
                f"{source} has a qrlora header of rank {header.rank} for {component}, which is not its own; it is "
                "ignored.",
                QrloraWarning,
                stacklevel=2,
            )
            header = None
        adapters[component] = Adapter(layers, header, component, source=str(source))
    return adapters


def encoder_tensors(adapter: Adapter, save_dtype: SaveDtype, *, alone: bool = False) -> dict[str, Tensor | Later]:
    """The companions as kohya's tools write them and ComfyUI reads them too: `lora_te1_{layer}.lora_down.weight`.

    Args:
        adapter: whose companions.
        save_dtype: of the factors.
        alone: of a model that has one text encoder, which has no number then.
    """
    tensors: dict[str, Tensor | Later] = {}
    for component, companion in adapter.companions.items():
        prefix = "lora_te_" if alone else _KOHYA[component]
        tensors |= kohya_tensors(companion.layers, partial(_kohya_stem, prefix), save_dtype)
    return tensors


def _kohya_stem(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_")


def kohya_tensors(
    layers: Mapping[str, LowRank], stem: Callable[[str], str], save_dtype: SaveDtype
) -> dict[str, Tensor | Later]:
    """Pairs as `{stem}.lora_down.weight`, `.lora_up.weight` and `.alpha`, the rank."""

    def keys(name: str) -> tuple[str, str]:
        return f"{stem(name)}.lora_down.weight", f"{stem(name)}.lora_up.weight"

    tensors: dict[str, Tensor | Later] = dict(stored_pairs(layers, keys, save_dtype))
    for name, pair in shapes_of(layers).items():
        # fp32 always: bf16 has no 513.
        tensors[f"{stem(name)}.alpha"] = torch.tensor(float(pair.rank))
    return tensors


def together(denoiser: Adapter | None, encoders: Mapping[Component, Adapter]) -> Adapter:
    """One adapter of all that a file holds; where it has no denoiser's, the first text encoder's has the others."""
    if denoiser is not None:
        return replace(denoiser, companions=dict(encoders))
    first, *rest = encoders.values()
    return replace(first, companions={each.component: each for each in rest})


def _config_of(config: Mapping[str, Any], component: Component) -> dict[str, Any]:
    """One component's part. Patterns match at the end of a path, with `text_model.` before it or not."""
    own = {key.removeprefix(f"{component}."): value for key, value in config.items() if key.startswith(f"{component}.")}
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(own.get(name), dict):
            own[name] = {pattern.removeprefix("^"): value for pattern, value in own[name].items()}
    return own
