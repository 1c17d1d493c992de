"""ComfyUI's spellings: whatever its loader takes, and, written, `diffusion_model.{original name}.lora_up.weight`.

Source: `comfy/lora.py` and `comfy/weight_adapter/lora.py` of https://github.com/comfyanonymous/ComfyUI.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qrlora.formats._adapter import Adapter
from qrlora.formats._encoders import encoder_keys, encoder_tensors, kohya_tensors
from qrlora.formats._header import header_metadata
from qrlora.formats._layout import AdapterFile, Evidence, ReadOptions, WritableLayout, WriteOptions, register_layout
from qrlora.formats._saving import checked_path
from qrlora.formats._write_safetensors import write_safetensors
from qrlora.formats.layouts._named import original_layers
from qrlora.formats.layouts._spelled import Spelled, assemble, named, spelled_keys

PREFIX = "diffusion_model."
# Read by the kohya and the diffusers layouts, where the names are diffusers'.
_ELSEWHERE = ("transformer.", "unet.")


class Comfy(WritableLayout):
    name = "comfy"
    title = "ComfyUI"

    def detect(self, file: AdapterFile, options: ReadOptions) -> Evidence | None:
        if file.config is not None:
            return None
        keys = [each for each in _keys(file) if not _is_anothers(each)]
        if not keys:
            return None
        spellings = Counter((each.prefix, each.suffix) for each in keys if each.role != "alpha")
        (prefix, suffix), _ = (spellings or Counter([(PREFIX, ".alpha")])).most_common(1)[0]
        encoders = len(encoder_keys(file.entries))
        return Evidence(
            len(keys) + encoders, f"{len(keys)} keys are spelled as ComfyUI reads them, most {prefix}LAYER{suffix}"
        )

    def match(self, file: AdapterFile, options: ReadOptions) -> Mapping[str, str]:
        return named(_keys(file), encoder_keys(file.entries))

    def build(self, file: AdapterFile, tensors: Mapping[str, Tensor], options: ReadOptions) -> Adapter:
        return assemble(file, _keys(file), tensors)

    def write(self, adapter: Adapter, path: str | Path, options: WriteOptions) -> Path:
        _, pairs = original_layers(adapter, options.family)
        tensors = kohya_tensors(pairs, PREFIX.__add__, options.save_dtype)
        tensors |= encoder_tensors(adapter, options.save_dtype)
        metadata = {"format": "pt", **header_metadata(adapter)}
        return write_safetensors(checked_path(path), tensors, metadata)


def _keys(file: AdapterFile) -> list[Spelled]:
    return spelled_keys(file.entries)


def _is_anothers(each: Spelled) -> bool:
    if each.prefix == "lora_unet_":
        return True
    modern = each.suffix in (".lora_A.weight", ".lora_B.weight", ".alpha")
    return each.prefix in _ELSEWHERE and not each.original and modern


COMFY = register_layout(Comfy())
