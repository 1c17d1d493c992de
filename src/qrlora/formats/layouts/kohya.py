"""kohya's layout: `lora_unet_{original name with underscores}.lora_down.weight`, `.lora_up.weight`, `.alpha`.

Source: `networks/lora.py`, `lora_flux.py`, `lora_sd3.py` of https://github.com/kohya-ss/sd-scripts, and for FLUX.2,
Qwen-Image and Z-Image those of https://github.com/kohya-ss/musubi-tuner. FLUX and SD3 fuse q, k, v (and FLUX.1's single
blocks their feed-forward too); the others have nothing fused that diffusers has not. Stable Diffusion 1, Qwen-Image and
Z-Image have diffusers' names.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qrlora.formats._adapter import Adapter
from qrlora.formats._encoders import KOHYA_PREFIXES, encoder_keys, encoder_tensors, kohya_tensors
from qrlora.formats._header import header_metadata
from qrlora.formats._layers import shapes_of
from qrlora.formats._layout import AdapterFile, Evidence, ReadOptions, WritableLayout, WriteOptions, register_layout
from qrlora.formats._saving import checked_path
from qrlora.formats._write_safetensors import write_safetensors
from qrlora.formats.layouts._named import original_layers
from qrlora.formats.layouts._spelled import Spelled, assemble, named, spelled_keys

PREFIX = "lora_unet_"
_ENCODERS = KOHYA_PREFIXES


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
        table, pairs = original_layers(adapter, options.family, kohya=True)
        tensors = kohya_tensors(pairs, lambda name: PREFIX + name.replace(".", "_"), options.save_dtype)
        tensors |= encoder_tensors(adapter, options.save_dtype, alone=table.one_encoder)
        rank = str(max(pair.rank for pair in shapes_of(pairs).values()))
        metadata = {
            "format": "pt",
            "ss_network_module": table.kohya_module,
            "ss_network_dim": rank,
            "ss_network_alpha": rank,
        }
        return write_safetensors(checked_path(path), tensors, metadata | header_metadata(adapter))


def _keys(file: AdapterFile) -> list[Spelled]:
    return spelled_keys(file.entries, PREFIX)


KOHYA = register_layout(Kohya())
