"""Stable Diffusion 3 and 3.5: the names of Stability AI's MMDiT, which kohya's sd-scripts and ComfyUI share.

Sources: `mmditx.py` of https://github.com/Stability-AI/sd3.5; `MMDIT_MAP_BASIC` and `MMDIT_MAP_BLOCK` in ComfyUI's
`comfy/utils.py`; `library/sd3_models.py` and `networks/lora_sd3.py` of https://github.com/kohya-ss/sd-scripts.
"""

from qrlora.formats.keys._table import Entry, KeyTable, Part, Swap, plain

_BLOCK, _OURS = "joint_blocks.{}", "transformer_blocks.{}"


def _attention(name: str, qkv: tuple[str, str, str], out: str) -> list[Entry]:
    return [
        Entry(f"{_BLOCK}.{name}.qkv", tuple(Part(f"{_OURS}.{each}") for each in qkv)),
        plain(f"{_BLOCK}.{name}.proj", f"{_OURS}.{out}"),
    ]


def _feed_forward(stream: str, ours: str, norm: str, swap: Swap) -> list[Entry]:
    return [
        plain(f"{_BLOCK}.{stream}.mlp.fc1", f"{_OURS}.{ours}.net.0.proj"),
        plain(f"{_BLOCK}.{stream}.mlp.fc2", f"{_OURS}.{ours}.net.2"),
        plain(f"{_BLOCK}.{stream}.adaLN_modulation.1", f"{_OURS}.{norm}.linear", swap),
    ]


SD3 = KeyTable(
    "sd3",
    "transformer",
    [
        *_attention("x_block.attn", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0"),
        *_attention("x_block.attn2", ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.to_out.0"),
        *_attention("context_block.attn", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.to_add_out"),
        *_feed_forward("x_block", "ff", "norm1", "never"),
        # The last block's text norm only shifts and scales, and diffusers has these two the other way round.
        *_feed_forward("context_block", "ff_context", "norm1_context", "if_two"),
        plain("x_embedder.proj", "pos_embed.proj"),
        plain("context_embedder", "context_embedder"),
        *(
            plain(f"{theirs}.mlp.{place}", f"time_text_embed.{ours}.linear_{number}")
            for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
            for number, place in ((1, 0), (2, 2))
        ),
        plain("final_layer.linear", "proj_out"),
        plain("final_layer.adaLN_modulation.1", "norm_out.linear", "always"),
    ],
    kohya_module="networks.lora_sd3",
)
