"""A folder as peft's own `save_pretrained` writes it, for `PeftModel.from_pretrained`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats._adapter import DORA, Adapter, Component, SaveDtype
from qrlora.formats._atomic import atomic_write
from qrlora.formats._factors import layers_of
from qrlora.formats._header import COMPONENT_KEY, header_metadata, json_object, read_header, stored_component
from qrlora.formats._later import Later
from qrlora.formats._native import (
    lora_config,
    magnitudes,
)
from qrlora.formats._safetensors import read_safetensors
from qrlora.formats._saving import stored_pairs
from qrlora.formats._write_safetensors import write_safetensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_MAX_CONFIG = 16 * 1024 * 1024
PREFIX = "base_model.model."


def write_peft_folder(adapter: Adapter, folder: str | Path, *, save_dtype: SaveDtype = "fp32") -> Path:
    """Write `adapter_model.safetensors` and a plain `adapter_config.json` into `folder` (made if missing).

    Raises:
        QrloraError: a value is not finite (nothing is written), or the folder cannot be written.
    """
    target = Path(folder)
    if target.is_file():
        raise QrloraError(f"{target} is a file; a peft adapter is a folder.")
    adapter.check_alone("written as a peft folder", "a peft folder has one model: write it for diffusers")
    if adapter.form != DORA:
        adapter.check_low_rank("written for peft")
    tensors: dict[str, Tensor | Later] = dict(stored_pairs(adapter.layers, _keys, save_dtype))
    tensors |= {f"{PREFIX}{key}": tensor for key, tensor in magnitudes(adapter, save_dtype).items()}
    base = adapter.header.base_model if adapter.header else None
    config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, "base_model_name_or_path": base}
    metadata = {"format": "pt", COMPONENT_KEY: adapter.component, **header_metadata(adapter)}
    write_safetensors(target / WEIGHTS_NAME, tensors, metadata)
    atomic_write(target / CONFIG_NAME, json.dumps(config | lora_config(adapter), indent=2, sort_keys=True) + "\n")
    return target


def _keys(name: str) -> tuple[str, str]:
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def read_peft_folder(folder: str | Path) -> Adapter:
    """Read a peft LoRA folder, ours or another tool's; any alpha is baked into the factors.

    Raises:
        QrloraError: a file is missing, the adapter is not a LoRA, or the weights are damaged, naming the key.
    """
    source = Path(folder)
    config = read_config(source / CONFIG_NAME)
    return adapter_from_folder(source, *read_safetensors(source / WEIGHTS_NAME), config)


def adapter_from_folder(
    source: Path, tensors: Mapping[str, Tensor | Later], metadata: Mapping[str, str], config: Mapping[str, Any]
) -> Adapter:
    """The adapter that a peft folder's tensors, metadata and configuration are; see `read_peft_folder`."""
    if config.get("peft_type") != "LORA":
        raise QrloraError(f"{source} is a peft adapter of type {config.get('peft_type')}, not LORA.")
    header = read_header(source, metadata)
    for key in tensors:
        if not key.startswith(PREFIX):
            raise QrloraError(f"{source}: {key} does not start with {PREFIX}, so it was not written by peft.")
    stripped = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    layers, own = layers_of(source, stripped, config, header)
    component = stored_component(metadata) or _guessed_component(layers)
    return Adapter(layers, header, component, own, source=str(source))


def read_config(path: Path) -> dict[str, Any]:
    """An `adapter_config.json`, as a JSON object."""
    if not path.is_file():
        raise QrloraError(f"{path} does not exist; a peft adapter folder has it beside {WEIGHTS_NAME}.")
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise QrloraError(f"{path} has {path.stat().st_size} bytes; a peft configuration is a few hundred.")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QrloraError(f"{path}: the file is not JSON: it is not UTF-8 text.") from error
    except OSError as error:
        raise QrloraError(f"{path} cannot be read: {error.strerror or error}.") from error
    return json_object(path, text, "the file")


def _guessed_component(names: Iterable[str]) -> Component:
    """peft's files do not say which component they belong to; U-Nets alone have these blocks."""
    blocks = ("down_blocks.", "mid_block.", "up_blocks.")
    return "unet" if any(name.startswith(blocks) for name in names) else "transformer"
