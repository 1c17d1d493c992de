"""peft's layout: a folder with `adapter_config.json` and `base_model.model.{layer}.lora_A.weight`, `lora_B.weight`."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qrlora.formats._adapter import Adapter
from qrlora.formats._later import Later
from qrlora.formats._layout import AdapterFile, Evidence, ReadOptions, WritableLayout, WriteOptions, register_layout
from qrlora.formats._peft_folder import CONFIG_NAME, PREFIX, adapter_from_folder, write_peft_folder

_SUFFIXES = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".alpha",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
)


class Peft(WritableLayout):
    name = "peft"
    title = "peft"
    extension = ""

    def detect(self, file: AdapterFile, options: ReadOptions) -> Evidence | None:
        if file.config is None:
            return None
        return Evidence(len(file.entries), f"the folder has {CONFIG_NAME}")

    def needs(self, file: AdapterFile, options: ReadOptions) -> str | None:
        kind = (file.config or {}).get("peft_type")
        return None if kind == "LORA" else f"is a peft adapter of type {kind}, not LORA"

    def match(self, file: AdapterFile, options: ReadOptions) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for key in file.entries:
            suffix = next((each for each in _SUFFIXES if key.endswith(each)), None)
            if suffix is not None and key.startswith(PREFIX):
                found[key] = key.removeprefix(PREFIX).removesuffix(suffix)
        return found

    def build(self, file: AdapterFile, tensors: Mapping[str, Tensor], options: ReadOptions) -> Adapter:
        assert file.config is not None  # `detect` said so
        return adapter_from_folder(file.source, tensors, file.metadata, file.config)

    def build_later(self, file: AdapterFile, tensors: Mapping[str, Later], options: ReadOptions) -> Adapter:
        assert file.config is not None  # `detect` said so
        return adapter_from_folder(file.source, tensors, file.metadata, file.config)

    def write(self, adapter: Adapter, path: str | Path, options: WriteOptions) -> Path:
        return write_peft_folder(adapter, path, save_dtype=options.save_dtype)


register_layout(Peft())
