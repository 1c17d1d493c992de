"""diffusers' own layout, which is our native file too: `{component}.{layer}.lora_A.weight`, `lora_B.weight`."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qrlora.formats._adapter import Adapter
from qrlora.formats._encoders import encoder_keys
from qrlora.formats._header import HEADER_KEY
from qrlora.formats._later import Later
from qrlora.formats._layout import AdapterFile, Evidence, ReadOptions, WritableLayout, WriteOptions, register_layout
from qrlora.formats._native import adapter_from, write_native
from qrlora.formats.layouts._spelled import spelled

_ENCODERS = ("text_encoder.", "text_encoder_2.")
_KEY = re.compile(r"(?:transformer|unet)\.(.+)\.(?:lora_[AB]\.weight|alpha|lora_magnitude_vector(?:\.weight)?)")


class Diffusers(WritableLayout):
    name = "diffusers"
    title = "diffusers"

    def detect(self, file: AdapterFile, options: ReadOptions) -> Evidence | None:
        keys = len(self.match(file, options)) if file.config is None else 0
        if not keys:
            return None
        ours = ", and the header is qrlora's" if HEADER_KEY in file.metadata else ""
        return Evidence(keys, f"{keys} keys are spelled COMPONENT.LAYER.lora_A.weight or lora_B.weight{ours}")

    def match(self, file: AdapterFile, options: ReadOptions) -> Mapping[str, str]:
        found = {text: match for text in file.entries if (match := _KEY.fullmatch(text)) and not _original(text)}
        # Of text encoders with the spellings of years ago too, which diffusers' scripts wrote for longer.
        encoders = {key: each for key, each in encoder_keys(file.entries).items() if each.prefix in _ENCODERS}
        return {text: match[1] for text, match in found.items()} | {key: each.path for key, each in encoders.items()}

    def build(self, file: AdapterFile, tensors: Mapping[str, Tensor], options: ReadOptions) -> Adapter:
        return adapter_from(file.source, tensors, file.metadata)

    def build_later(self, file: AdapterFile, tensors: Mapping[str, Later], options: ReadOptions) -> Adapter:
        return adapter_from(file.source, tensors, file.metadata)

    def write(self, adapter: Adapter, path: str | Path, options: WriteOptions) -> Path:
        return write_native(adapter, path, save_dtype=options.save_dtype)


def _original(key: str) -> bool:
    found = spelled(key)
    return found is not None and found.original


register_layout(Diffusers())
