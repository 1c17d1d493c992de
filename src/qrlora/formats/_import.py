"""Reading an adapter of any known layout, with an account of every key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrlora.errors import QrloraError
from qrlora.formats._adapter import BEYOND_LORA, Adapter, check_finite
from qrlora.formats._layers import LayersOnDemand
from qrlora.formats._layout import AdapterFile, Evidence, Layout, ReadOptions, WeightSource, layout_named, layouts
from qrlora.formats._peft_folder import CONFIG_NAME, WEIGHTS_NAME, read_config
from qrlora.formats._safetensors import read_contents, shown

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
MAX_RANK = 8192
_TEXT_ENCODERS = ("lora_te", "text_encoder", "text_encoders.", "te1_", "te2_", "conditioner.")
# Tensors that make a layer's update something else than W + B A: dropping them would give a wrong adapter.
_OTHER_METHODS: Mapping[str, str] = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid.": "a Tucker decomposition (LoCon's lora_mid)",
    "reshape_weight": "a change of the weight's shape",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "vera_lambda": "VeRA",
}


@dataclass(frozen=True)
class Recognised:
    """What an adapter's header tells, before anything is loaded.

    Attributes:
        file: its header, checked.
        layout: how its keys are spelled.
        evidence: how that was seen.
        matched: each key that is understood, and the layers it belongs to.
        unmatched: the other keys.
        needs: what is missing to read it, or why it cannot be read as a LoRA; None where it can.
    """

    file: AdapterFile
    layout: Layout
    evidence: str
    matched: Mapping[str, str]
    unmatched: tuple[str, ...]
    needs: str | None


@dataclass(frozen=True)
class Imported:
    """An adapter as read, and what was made of the file's keys."""

    adapter: Adapter
    recognised: Recognised = field(repr=False)


def recognise(
    path: str | Path,
    *,
    layout: str | None = None,
    basis: str | None = None,
    base: WeightSource | None = None,
    lora_alpha: float | None = None,
    top_k: int | None = None,
) -> Recognised:
    """Tell an adapter file's layout by its header; the arguments are those of `import_adapter`.

    Raises:
        QrloraError: nothing there, a damaged file, no known layout, or several that fit equally well.
    """
    return _recognise(path, layout, ReadOptions(basis, base, lora_alpha, top_k))


def import_adapter(
    path: str | Path,
    *,
    layout: str | None = None,
    basis: str | None = None,
    base: WeightSource | None = None,
    lora_alpha: float | None = None,
    top_k: int | None = None,
    allow_unmatched: bool = False,
    lazy: bool = False,
) -> Imported:
    """Read an adapter of any known layout, ours or another tool's; every alpha is baked into the factors.

    Args:
        path: a `.safetensors` file, a peft folder, or a folder that diffusers saved to.
        layout: name of a layout, for a file that fits several; found by its keys where None.
        basis: for files of the published code and its fork, whose keys do not say it: qr, svd, ica, moe.
        base: dense base weights by layer, for files that mean a difference from them; see `weight_source`.
        lora_alpha: for the same files, which do not say it, the alpha they were trained with; the rank where None.
        top_k: for files of Freq-MoE, which do not say it, how many experts act on a token; all where None.
        allow_unmatched: leave out keys that are not understood (T5 encoders, biases...), instead of refusing.
        lazy: read the layers of diffusers' files (ours) and peft's from the file whenever they are asked for, and check
            their values then; merging and writing hold one layer at a time. Other layouts are read at once.

    Raises:
        QrloraError: nothing there, or what is there is truncated, not finite, of an unknown layout or of absurd size,
            with keys that are not understood or without something it needs; the sentence names the file and the key.
    """
    options = ReadOptions(basis, base, lora_alpha, top_k)
    recognised = _recognise(path, layout, options)
    file = recognised.file
    _check_options(file, recognised.layout, options)
    if recognised.needs is not None:
        raise QrloraError(f"{file.source} {recognised.needs}.")
    _check_method(file, recognised.matched)
    if recognised.unmatched and not allow_unmatched:
        raise QrloraError(_unmatched(recognised))
    if not recognised.matched:
        raise QrloraError(f"{file.source} has no key of a layer; {_unmatched(recognised)}")
    for key in recognised.matched:
        shape = file.entries[key].shape
        if len(shape) > 1 and min(shape[0], shape[1]) > MAX_RANK:
            raise QrloraError(
                f"{file.source}: {shown(key)} has the shape {list(shape)}, so a rank above {MAX_RANK}; this is no LoRA."
            )
    if lazy:
        adapter = recognised.layout.build_later(file, file.later(recognised.matched), options)
    else:
        adapter = recognised.layout.build(file, file.load(recognised.matched), options)
    _check_built(file, adapter)
    return Imported(adapter, recognised)


def _check_options(file: AdapterFile, layout: Layout, options: ReadOptions) -> None:
    for name in ("basis", "lora_alpha", "top_k"):
        if getattr(options, name) is not None and name not in layout.takes:
            raise QrloraError(
                f"{file.source} is of the layout {layout.title}, to which {name} means nothing; leave --"
                f"{name.replace('_', '-')} out."
            )


def _check_built(file: AdapterFile, adapter: Adapter) -> None:
    """In fp32 and with its scale, what was finite in the file may be no more."""
    for part in adapter.components.values():
        # Layers on demand are checked each time they are read.
        for layer, pair in () if isinstance(part.layers, LayersOnDemand) else part.layers.items():
            for tensor in (pair.A, pair.B, *part.own.get(layer, {}).values()):
                check_finite(f"{file.source}: {layer}", tensor)
    if adapter.form in BEYOND_LORA and not adapter.own:
        raise QrloraError(
            f"{file.source} says that it is a {adapter.form} adapter, but the tensors of that form are missing; "
            "another tool has dropped them."
        )


def _recognise(path: str | Path, layout: str | None, options: ReadOptions) -> Recognised:
    file = open_adapter(path)
    found, evidence = _chosen(file, options) if layout is None else _forced(file, layout, options)
    matched = found.match(file, options)
    unmatched = tuple(key for key in file.entries if key not in matched)
    return Recognised(file, found, evidence.why, matched, unmatched, found.needs(file, options))


def open_adapter(path: str | Path) -> AdapterFile:
    """An adapter's file with its header checked, wherever in a folder it is.

    Raises:
        QrloraError: nothing there, a pickle, a damaged or an empty file.
    """
    source = Path(path)
    config: Mapping[str, Any] | None = None
    tensors_at = source
    if source.is_dir():
        tensors_at, config = _in_folder(source)
    contents = read_contents(tensors_at)
    if not contents.entries:
        raise QrloraError(f"{source} holds no tensors.")
    return AdapterFile(source if config is not None else tensors_at, tensors_at, contents, config)


def _in_folder(folder: Path) -> tuple[Path, Mapping[str, Any] | None]:
    if (folder / CONFIG_NAME).is_file():
        weights = folder / WEIGHTS_NAME
        old = weights.with_suffix(".bin")
        return (old if old.is_file() and not weights.is_file() else weights), read_config(folder / CONFIG_NAME)
    weights = folder / DIFFUSERS_NAME
    if not weights.is_file() and not weights.with_suffix(".bin").is_file():
        raise QrloraError(
            f"{folder} is a folder with neither {CONFIG_NAME} (peft) nor {DIFFUSERS_NAME} (diffusers) in it."
        )
    return (weights if weights.is_file() else weights.with_suffix(".bin")), None


def _chosen(file: AdapterFile, options: ReadOptions) -> tuple[Layout, Evidence]:
    claims = [(each, claim) for each in layouts() if (claim := each.detect(file, options)) is not None]
    if not claims:
        key = next(iter(file.entries))
        raise QrloraError(
            f"{file.source} is of no layout known here ({', '.join(each.title for each in layouts())}); its first key "
            f"is {shown(key)}."
        )
    most = max(claim.keys for _, claim in claims)
    best = [(each, claim) for each, claim in claims if claim.keys == most]
    if len(best) > 1:
        described = " or ".join(f"{each.name} ({claim.why})" for each, claim in best)
        raise QrloraError(f"{file.source} may be {described}; say which with layout= (qrlora export --layout).")
    return best[0]


def _forced(file: AdapterFile, layout: str, options: ReadOptions) -> tuple[Layout, Evidence]:
    found = layout_named(layout)
    return found, found.detect(file, options) or Evidence(0, "it was said to be")


def _check_method(file: AdapterFile, matched: Mapping[str, str]) -> None:
    for key in file.entries:
        if key in matched:
            continue
        for mark, method in _OTHER_METHODS.items():
            if mark in key:
                raise QrloraError(
                    f"{file.source} uses {method} ({shown(key)}), so it is more than W + B A; merge it down to a plain "
                    "LoRA with the tool that made it first."
                )


def _unmatched(recognised: Recognised) -> str:
    file, keys = recognised.file, recognised.unmatched
    encoders = sum(key.startswith(_TEXT_ENCODERS) for key in keys)
    names = _listed(keys)
    kind = f", {encoders} of them of text encoders" if encoders else ""
    return (
        f"{file.source}: {len(keys)} of {len(file.entries)} keys are not understood as {recognised.layout.title}"
        f"{kind}: {names}; allow_unmatched=True (qrlora export --allow-unmatched) leaves them out."
    )


def _listed(keys: Sequence[str], most: int = 4) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(shown(key) for key in keys[:most]) + more
