"""Qwen-Image: its code has diffusers' names, and so have kohya's musubi-tuner and ComfyUI.

Source: `qwen_image_model.py` of https://github.com/kohya-ss/musubi-tuner and ComfyUI's `comfy/ldm/qwen_image/model.py`.
"""

from qrlora.formats.keys._table import KeyTable, plain

_LAYERS = (
    *(f"attn.{each}" for each in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{each}" for each in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_{layer}" for stream in ("img", "txt") for layer in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
)
_OTHERS = (
    "img_in",
    "txt_in",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)

QWEN_IMAGE = KeyTable(
    "qwen-image",
    "transformer",
    [plain(name, name) for name in (*(f"transformer_blocks.{{}}.{layer}" for layer in _LAYERS), *_OTHERS)],
    kohya_module="networks.lora_qwen_image",
)
