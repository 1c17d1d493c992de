"""kohya's layout: `lora_unet_{original name with underscores}.lora_down.weight`, `.lora_up.weight`, `.alpha`.

Source: `networks/lora.py`, `lora_flux.py`, `lora_sd3.py` of https://github.com/kohya-ss/sd-scripts. FLUX and SD3 fuse
q, k, v (and FLUX's single blocks their feed-forward too); SDXL has nothing fused.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qrlora.formats._adapter import Adapter
from qrlora.formats._encoders import KOHYA_PREFIXES, encoder_keys, encoder_tensors
from qrlora.formats._header import header_metadata
from qrlora.formats._layout import AdapterFile, Evidence, ReadOptions, WritableLayout, WriteOptions, register_layout
from qrlora.formats._safetensors import write_safetensors
from qrlora.formats._saving import cast_to_save, checked_path
from qrlora.formats.keys import Family
from qrlora.formats.layouts._named import original_layers
from qrlora.formats.layouts._spelled import Spelled, assemble, named, spelled

PREFIX = "lora_unet_"
_ENCODERS = KOHYA_PREFIXES
_MODULES: Mapping[Family, str] = {
    "flux": "networks.lora_flux",
    "sd3": "networks.lora_sd3",
    "sdxl": "networks.lora",
}


class Kohya(WritableLayout):
    name = "kohya"
    title = "kohya sd-scripts"

    def detect(self, file: AdapterFile, options: ReadOptions) -> Evidence | None:
        keys = [key for key in file.entries if key.startswith((PREFIX, *_ENCODERS))]
        return Evidence(len(keys), f"{len(keys)} keys start with {PREFIX} or lora_te") if keys else None

    def match(self, file: AdapterFile, options: ReadOptions) -> Mapping[str, str]:
        encoders = {key: each for key, each in encoder_keys(file.entries).items() if each.prefix in _ENCODERS}
        return named(_keys(file), encoders)

    def build(self, file: AdapterFile, tensors: Mapping[str, Tensor], options: ReadOptions) -> Adapter:
        return assemble(file, _keys(file), tensors)

    def write(self, adapter: Adapter, path: str | Path, options: WriteOptions) -> Path:
        family, pairs = original_layers(adapter, options.family)
        tensors: dict[str, Tensor] = {}
        for name, pair in pairs.items():
            stem = PREFIX + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = cast_to_save(name, pair.A, options.save_dtype)
            tensors[f"{stem}.lora_up.weight"] = cast_to_save(name, pair.B, options.save_dtype)
            # fp32 always: bf16 has no 513.
            tensors[f"{stem}.alpha"] = torch.tensor(float(pair.rank))
        tensors |= encoder_tensors(adapter, options.save_dtype)
        rank = str(max(pair.rank for pair in pairs.values()))
        metadata = {
            "format": "pt",
            "ss_network_module": _MODULES[family],
            "ss_network_dim": rank,
            "ss_network_alpha": rank,
        }
        return write_safetensors(checked_path(path), tensors, metadata | header_metadata(adapter))


def _keys(file: AdapterFile) -> list[Spelled]:
    found = (spelled(key) for key in file.entries if key.startswith(PREFIX))
    return [each for each in found if each is not None]


KOHYA = register_layout(Kohya())
