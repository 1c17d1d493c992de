"""Stable Diffusion 1 and 2: the names of their original code, which ComfyUI has; kohya's sd-scripts train them on
diffusers' (`library/original_unet.py` of https://github.com/kohya-ss/sd-scripts)."""

from qrlora.formats.keys._table import KeyTable
from qrlora.formats.keys._unet import unet_entries

SD15 = KeyTable(
    "sd15",
    "unet",
    list(unet_entries(4, (0, 1, 2), (1, 2, 3), {})),
    kohya_module="networks.lora",
    kohya_by_path=True,
    one_encoder=True,
)
