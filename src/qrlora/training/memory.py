"""`memory`: plain settings for a card of some size, by the size of the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from qrlora.errors import QrloraError
from qrlora.models import LoadedModel, load_pipeline
from qrlora.training.config import Memory, TrainConfig

MEMORY_FIELDS = ("gradient_checkpointing", "quantization", "offload", "encoder_offload")
GIB: Mapping[Memory, float | None] = MappingProxyType(
    {"6gb": 6, "8gb": 8, "12gb": 12, "16gb": 16, "24gb": 24, "max": None}
)
"""What each is for, in GiB; `max` asks for speed alone."""

_Settings = Mapping[str, Any]


def _settings(
    quantization: str | None = None, *, checkpointing: bool = True, offload: str = "none", encoder_offload: str = "none"
) -> _Settings:
    return MappingProxyType(
        dict(zip(MEMORY_FIELDS, (checkpointing, quantization, offload, encoder_offload), strict=True))
    )


_STREAMED = _settings("nf4", offload="blocks", encoder_offload="blocks")
_FASTEST = _settings(checkpointing=False)

# By billions of parameters of the denoiser, at most. docs/memory.md has the estimates behind it at rank 64 and 512 px;
# a test asks for them again.
PRESETS: Mapping[float, Mapping[Memory, _Settings]] = MappingProxyType(
    {
        # SD1.5, SD3-medium, SD3.5-medium, SDXL
        3.0: {
            "6gb": _settings("int8", encoder_offload="blocks"),
            "8gb": _settings(encoder_offload="blocks"),
            "12gb": _settings(encoder_offload="blocks"),
            "16gb": _settings(),
            "24gb": _FASTEST,
            "max": _FASTEST,
        },
        # FLUX.2-klein-4B
        5.0: {
            "6gb": _settings("nf4", encoder_offload="blocks"),
            "8gb": _settings("int8", encoder_offload="blocks"),
            "12gb": _settings(encoder_offload="blocks"),
            "16gb": _settings(),
            "24gb": _settings(),
            "max": _FASTEST,
        },
        # Z-Image, SD3.5-large
        9.0: {
            "6gb": _STREAMED,
            "8gb": _settings("nf4", encoder_offload="blocks"),
            "12gb": _settings("int8", encoder_offload="blocks"),
            "16gb": _settings("int8"),
            "24gb": _settings(),
            "max": _FASTEST,
        },
        # FLUX.2-klein-9B, FLUX.1
        13.0: {
            "6gb": _STREAMED,
            "8gb": _STREAMED,
            "12gb": _settings("nf4", encoder_offload="blocks"),
            "16gb": _settings("int8", encoder_offload="blocks"),
            "24gb": _settings("int8"),
            "max": _FASTEST,
        },
        # Qwen-Image
        21.0: {
            **dict.fromkeys(("6gb", "8gb", "12gb"), _STREAMED),
            "16gb": _settings("nf4", encoder_offload="blocks"),
            "24gb": _settings("nf4"),
            "max": _FASTEST,
        },
        # FLUX.2-dev, which takes more than 6 GiB all the same, and at 1024 px more than 8
        float("inf"): {**dict.fromkeys(("6gb", "8gb", "12gb", "16gb", "24gb"), _STREAMED), "max": _FASTEST},
    }
)


def parameters_of(denoiser: nn.Module) -> int:
    """How many numbers the weights of a denoiser are, packed or not, without adapters."""
    total = 0
    for name, module in denoiser.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, nn.Linear):
            total += module.in_features * module.out_features + (0 if module.bias is None else module.out_features)
        else:
            total += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return total


def preset(memory: Memory, denoiser: nn.Module) -> dict[str, Any]:
    """The settings that `memory` means for a denoiser of this size, which need not have values.

    A denoiser that was saved quantised stays as it is.
    """
    billions = parameters_of(denoiser) / 1e9
    row = next(row for most, row in sorted(PRESETS.items()) if billions <= most)
    settings = dict(row[memory])
    if getattr(denoiser, "config", {}).get("quantization_config") is not None:
        del settings["quantization"]
    return settings


def with_preset(config: TrainConfig, loaded: LoadedModel) -> dict[str, Any]:
    """The model's training defaults, and above them what `memory` means; `config.with_defaults` takes them."""
    memory = config.with_defaults(loaded.training).memory
    return {**loaded.training, **({} if memory is None else preset(memory, loaded.denoiser))}


def load_for(
    memory: Memory | None, model: str | Path, *, dtype: torch.dtype, device: str | torch.device
) -> LoadedModel:
    """Load a whole model as `memory` has it, else as its own training defaults have it; see `load_pipeline`.

    A training frees the encoders before it reads the denoiser; here both are there at once, so with any `memory` but
    "max" the blocks of the encoders stay in the CPU's memory.

    Raises:
        QrloraError: no such model, or the device is too small for it.
    """
    loaded = load_pipeline(model, dtype=dtype, denoiser=False)
    memory = memory or loaded.training.get("memory")
    settings = {**loaded.training, **({} if memory is None else preset(memory, loaded.denoiser))}
    streamed = "blocks" if memory not in (None, "max") else settings.get("encoder_offload", "none")
    loaded.keep_as(settings.get("quantization"), settings.get("offload", "none"), streamed)
    with enough_to("load the model", memory):
        loaded.place_encoders(device)
        loaded.load_denoiser(device)
    return loaded


def as_loaded(config: TrainConfig, loaded: LoadedModel) -> TrainConfig:
    """The configuration of a run on a model that is there already, quantised and offloaded as it is.

    Args:
        config: as given, with presets and the model's defaults filled in.
        loaded: the model.

    Raises:
        QrloraError: something else was asked for.
    """
    has = {name: getattr(loaded, name) for name in MEMORY_FIELDS if name != "gradient_checkpointing"}
    for name, value in has.items():
        if name == "encoder_offload" and value == "blocks":
            continue  # serves whoever would have them whole
        if name in config.model_fields_set and getattr(config, name) != value:
            because = "" if config.memory is None else f" (memory: {config.memory})"
            raise QrloraError(
                f"{name}={getattr(config, name)} is asked for{because}, but the model is loaded already, with "
                f"{name}={value}; ask for it where it is loaded (qrlora blend --memory, load_pipeline)."
            )
    return config.model_copy(update=has)


@contextmanager
def enough_to(act: str, memory: Memory | None) -> Iterator[None]:
    """Tell a device that is too small for something other than a training in one sentence.

    Raises:
        QrloraError: instead of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        raise QrloraError(
            f"{words}. Too little to {act}: give --memory what your card has or less (it is {memory or 'not set'}), or "
            "lower --height and --width. Adapters that were trained are kept; a blend goes on with --resume."
        ) from error


@contextmanager
def enough_memory(config: TrainConfig) -> Iterator[None]:
    """Tell a device that is too small for the run in one sentence.

    Raises:
        QrloraError: instead of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        raise QrloraError(
            f"{words}. Set memory: to what your card has (it is {config.memory or 'not set'}; qrlora estimate says "
            "what a run needs), or lower resolution, train_batch_size or adapter.rank. What was saved stays."
        ) from error
