"""`qrlora estimate`: what a training will take of a card's memory, without loading anything."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qrlora.cli.train import split_arguments
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.models import Blueprint
    from qrlora.training import Estimate, TrainConfig

USAGE = """usage: qrlora estimate [CONFIG.yaml] [--model MODEL] [--any.key value ...] [--card GIB] [--json]

The memory that `qrlora train` would take with these settings, from a training step computed without numbers. Nothing is
loaded: MODEL is a folder, a hub id (its configuration files are fetched), or one of those that come with qrlora:
{models}.

Every key of a training configuration is an option: --memory 8gb --resolution 1024 --adapter.rank 16 (or --rank 16).

  --card GIB   whether it fits a card of so many GiB, and which memory: setting does; without it, the card that
               memory: names, or the one that is here
  --json       as JSON, in bytes
"""
_GIB = 2**30
_SHORT = {"rank": "adapter.rank", "basis": "adapter.basis"}


def run(arguments: Sequence[str]) -> None:
    """Parse, estimate and print."""
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        from qrlora.models import shipped_models

        print(USAGE.format(models=", ".join(shipped_models())))
        return
    file, given = split_arguments(arguments)
    as_json, card = given.pop("json", False), _number(given.pop("card", None))
    from qrlora import starter
    from qrlora.models import read_blueprint
    from qrlora.training import TrainConfig, estimate

    overrides = {_SHORT.get(key, key): value for key, value in given.items()}
    # What only a training needs is not asked for.
    needless = {"instance_data_dir": "pictures", "instance_prompt": "a picture", "output_dir": "out"}
    if file is None:
        config = TrainConfig.parse(needless | overrides, "the options")
    else:
        config = TrainConfig.from_yaml(file, overrides)
    blueprint = read_blueprint(config.model or starter.path())
    found = estimate(config, blueprint)
    card = card or _card(found)
    if as_json:
        print(json.dumps(_as_json(found, card), indent=2))
    else:
        print("\n".join(_lines(found, card, config, blueprint)))


def _number(text: Any) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise QrloraError(f"--card {text} is not valid: give the card's memory in GiB, such as 24.")
    return value


def _card(found: "Estimate") -> float | None:
    """GiB of the card meant: the one that `memory` names, else the one that is here, else None."""
    import torch

    from qrlora.training import GIB

    if found.config.memory is not None and GIB[found.config.memory] is not None:
        return GIB[found.config.memory]
    if torch.device(found.config.device or "cuda").type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / _GIB
    return None


def _as_json(found: "Estimate", card: float | None) -> dict[str, Any]:
    return {
        "model": found.model,
        "estimate": True,
        "settings": _settings(found.config),
        "layers": found.layers,
        "trained": found.trained,
        "phases": {phase.name: phase.parts | {"total": phase.total} for phase in found.phases},
        "context": found.context,
        "peak": found.peak,
        "host": found.host,
        "card_gib": card,
        "fits": None if card is None else found.fits(card),
    }


def _settings(config: "TrainConfig") -> dict[str, Any]:
    names = (
        *("memory", "gradient_checkpointing", "quantization", "offload", "encoder_offload", "mixed_precision"),
        *("resolution", "train_batch_size", "gradient_accumulation_steps", "optimizer", "use_8bit_adam", "use_ema"),
    )
    return {"adapter.rank": config.adapter.rank, "adapter.basis": config.adapter.basis} | {
        name: getattr(config, name) for name in names
    }


def _lines(found: "Estimate", card: float | None, config: "TrainConfig", blueprint: "Blueprint") -> list[str]:
    settings = ", ".join(f"{key}: {value}" for key, value in _settings(found.config).items() if value is not None)
    lines = [
        f"{found.model}: {found.layers} layers adapted, {found.trained / 1e6:.2f} M numbers trained",
        f"{settings}",
        "",
        "an estimate in GiB; nothing was measured",
    ]
    for phase in found.phases:
        lines += ["", f"  {phase.name}"]
        lines += [f"    {name:<40} {_gib(size)}" for name, size in phase.parts.items() if size]
        lines.append(f"    {'at its peak':<40} {_gib(phase.total)}")
    lines += ["", f"  {'largest phase: ' + found.largest.name:<42} {_gib(found.largest.total)}"]
    if found.context:
        lines.append(f"  {'context of the device (about)':<42} {_gib(found.context)}")
    lines.append(f"  {'in all':<42} {_gib(found.peak)}")
    if found.host:
        lines.append(f"  {'streamed blocks in the CPU memory':<42} {_gib(found.host)}")
    return [*lines, "", _verdict(found, card, config, blueprint)]


def _gib(size: int) -> str:
    return f"{size / _GIB:8.2f}" if size >= _GIB / 200 else f"{size / _GIB:8.4f}"


def _verdict(found: "Estimate", card: float | None, config: "TrainConfig", blueprint: "Blueprint") -> str:
    from qrlora.training import fitting_memory

    if card is None:
        return "--card GIB says whether that fits a card."
    if found.fits(card):
        return f"fits a card of {card:g} GiB, if nothing else is on it."
    other = fitting_memory(config, blueprint, card)
    if other is None:
        return (
            f"does not fit a card of {card:g} GiB, nor does it with any memory: setting; lower resolution, "
            "train_batch_size or adapter.rank."
        )
    memory, better = other
    return f"does not fit a card of {card:g} GiB; memory: {memory} would, with {better.peak / _GIB:.2f} GiB."
