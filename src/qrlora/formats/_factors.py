"""Factors as files of diffusers and peft hold them, paired up by layer."""

import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._adapter import MAGNITUDE, Header, LowRank, check_finite, check_pair, scaled_pair
from qrlora.formats._later import Later, had
from qrlora.formats._layers import LayersOnDemand

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


def layers_of(
    source: Path, tensors: Mapping[str, Tensor | Later], config: Mapping[str, Any], header: Header | None
) -> tuple[Mapping[str, LowRank], dict[str, dict[str, Tensor]]]:
    """Pair up `{layer}.lora_A.weight` and `{layer}.lora_B.weight`, in fp32, with the scale of `config` baked in.

    Returns:
        The pairs by layer (on demand where their tensors are had later), and DoRA's magnitudes by layer and key.
    """
    factors: dict[str, dict[str, Tensor | Later]] = {}
    others: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, found, factor = _split(key)
        if not found:
            raise QrloraError(
                f"{source}: {key} is not a key of a LoRA as diffusers or peft write it "
                "(LAYER.lora_A.weight, LAYER.lora_B.weight); convert the file first."
            )
        if not tensor.dtype.is_floating_point:
            raise QrloraError(f"{source}: {key} has dtype {tensor.dtype}; the factors of a LoRA are floating point.")
        parts = factors.setdefault(name, {})
        if factor in ("lora_A", "lora_B"):
            parts[factor] = tensor if isinstance(tensor, Later) else _checked(f"{source}: {key}", tensor)
        else:
            others.setdefault(name, {})[factor] = _checked(f"{source}: {key}", had(tensor))
    own = _magnitudes_of(source, factors, others, config)
    _check_plain(source, {**config, "use_dora": False} if own else config)
    alphas = _Alphas(config)
    shapes: dict[str, LowRank] = {}
    scales: dict[str, float] = {}
    for name in sorted(factors, key=natural_key):
        parts, label = factors[name], f"{source}: {name}"
        for factor in ("lora_A", "lora_B"):
            if factor not in parts:
                raise QrloraError(f"{label}.{factor}.weight is missing while its other factor is there.")
        shapes[name] = LowRank(_blank(parts["lora_B"]), _blank(parts["lora_A"]))
        check_pair(label, shapes[name])
        scales[name] = _scale(label, shapes[name].rank, name, others.get(name, {}), alphas)

    def made(name: str) -> LowRank:
        label, parts = f"{source}: {name}", factors[name]
        B, A = (
            _checked(f"{label}.{factor}.weight", tensor.get()) if isinstance(tensor, Later) else tensor
            for factor in ("lora_B", "lora_A")
            for tensor in (parts[factor],)
        )
        return scaled_pair(LowRank(B, A), scales[name], header)

    def made_anew(name: str) -> LowRank:
        pair = made(name)
        for tensor in (pair.B, pair.A) if scales[name] != 1 else ():
            check_finite(f"{source}: {name}", tensor)
        return pair

    if any(isinstance(tensor, Later) for parts in factors.values() for tensor in parts.values()):
        return LayersOnDemand(shapes, made_anew), own
    return {name: made(name) for name in shapes}, own


def _checked(label: str, tensor: Tensor) -> Tensor:
    check_finite(label, tensor)
    return tensor.float()


def _blank(tensor: Tensor | Later) -> Tensor:
    return torch.empty(tuple(tensor.shape), device="meta")


def _magnitudes_of(
    source: Path,
    factors: Mapping[str, Mapping[str, Tensor | Later]],
    others: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
) -> dict[str, dict[str, Tensor]]:
    """DoRA's tensors; there for every layer or for none."""
    own = {name: {MAGNITUDE: parts[MAGNITUDE]} for name, parts in others.items() if MAGNITUDE in parts}
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


def _scale(label: str, rank: int, name: str, found: Mapping[str, Tensor], alphas: "_Alphas") -> float:
    try:
        alpha = float(found["alpha"]) if "alpha" in found else alphas.of(name, rank)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise QrloraError(f"{label} has an alpha, or an alpha_pattern, that cannot be used: {error}.") from error
    scale = alpha / math.sqrt(rank) if alphas.root else alpha / rank
    if not math.isfinite(scale):
        raise QrloraError(f"{label} has the alpha {alpha}, which is not a finite number.")
    return scale


class _Alphas:
    """The layers' alphas by peft's own rule: the first pattern that matches the end of the path, else the default.

    Only names of layers, as tools write them, are taken for patterns: a stranger's expression may never end. The
    patterns are read once, so that thousands of layers and patterns take no longer than both together.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.root = bool(config.get("use_rslora"))

    def of(self, name: str, otherwise: float) -> float:
        """A layer's alpha; `otherwise` where the configuration has none."""
        whole, ends, bad = self._patterns
        found = [table[name] for table in (whole, ends) if name in table]
        tails = [name[-length:] for length in self._lengths if length < len(name) and name[-length - 1] == "."]
        found += [ends[tail] for tail in tails if tail in ends]
        if found:
            return float(min(found, key=lambda each: each[0])[1])
        if bad is not None:
            raise ValueError(f"alpha_pattern has {bad[:80]!r}, which is not the name of a layer")
        return float(self._config.get("lora_alpha", otherwise))

    @cached_property
    def _patterns(self) -> tuple[dict[str, tuple[int, Any]], dict[str, tuple[int, Any]], str | None]:
        """Place and value by path, for whole paths and for their ends, and the first pattern that is no name."""
        whole: dict[str, tuple[int, Any]] = {}
        ends: dict[str, tuple[int, Any]] = {}
        patterns = cast(dict[str, Any], self._config.get("alpha_pattern") or {})
        for place, (pattern, value) in enumerate(patterns.items()):
            path = re.sub(r"\\([^\w\s])", r"\1", pattern.removeprefix("^").removesuffix("$"))
            if not re.fullmatch(r"[\w.-]+", path):
                return whole, ends, pattern
            (whole if pattern.startswith("^") else ends).setdefault(path, (place, value))
        return whole, ends, None

    @cached_property
    def _lengths(self) -> set[int]:
        return {len(path) for path in self._patterns[1]}


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
