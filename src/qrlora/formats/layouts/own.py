"""Our own layout, for forms of adapters that no other tool knows: `{component}.{layer}.{form}.B`, `.A` and `.{key}`."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qrlora.formats._adapter import Adapter
from qrlora.formats._header import read_header
from qrlora.formats._layout import AdapterFile, Evidence, ReadOptions, WritableLayout, WriteOptions, register_layout
from qrlora.formats._own_form import own_form_from, write_own_form


class Own(WritableLayout):
    name = "own"
    title = "qrlora's own"

    def detect(self, file: AdapterFile, options: ReadOptions) -> Evidence | None:
        keys = self.match(file, options)
        return Evidence(len(keys), f"{len(keys)} keys are those of the form its header names") if keys else None

    def match(self, file: AdapterFile, options: ReadOptions) -> Mapping[str, str]:
        header = read_header(file.source, file.metadata)
        if file.config is not None or header is None or header.form is None:
            return {}
        key_of = re.compile(rf"(?:transformer|unet)\.(.+)\.{re.escape(header.form)}\.\w+")
        return {key: found[1] for key in file.entries if (found := key_of.fullmatch(key))}

    def build(self, file: AdapterFile, tensors: Mapping[str, Tensor], options: ReadOptions) -> Adapter:
        return own_form_from(file.source, tensors, file.metadata)

    def write(self, adapter: Adapter, path: str | Path, options: WriteOptions) -> Path:
        return write_own_form(adapter, path, save_dtype=options.save_dtype)


register_layout(Own())
