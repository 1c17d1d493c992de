"""SDXL: the names of Stability AI's U-Net (`sgm`), on which kohya's sd-scripts train SDXL too."""

from qrlora.formats.keys._table import KeyTable
from qrlora.formats.keys._unet import unet_entries

_SIZES = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}

SDXL = KeyTable("sdxl", "unet", list(unet_entries(3, (1, 2), (0, 1), _SIZES)), kohya_module="networks.lora")
