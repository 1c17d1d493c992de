"""FLUX.1: the names of Black Forest Labs' code, which kohya's sd-scripts and ComfyUI share.

Sources: `DoubleStreamBlock`, `SingleStreamBlock` and `LastLayer` in `flux/modules/layers.py` of
https://github.com/black-forest-labs/flux; `flux_to_diffusers` in ComfyUI's `comfy/utils.py`; the lists of keys in
`networks/convert_flux_lora.py` of https://github.com/kohya-ss/sd-scripts.
"""

from qrlora.formats.keys._table import Entry, KeyTable, Part, plain

_DOUBLE, _OURS = "double_blocks.{}", "transformer_blocks.{}"
_SINGLE, _OUR_SINGLE = "single_blocks.{}", "single_transformer_blocks.{}"
_EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}


def _stream(stream: str, qkv: tuple[str, str, str], out: str, feed_forward: str, norm: str) -> list[Entry]:
    name = f"{_DOUBLE}.{stream}"
    return [
        Entry(f"{name}_attn.qkv", tuple(Part(f"{_OURS}.attn.{each}") for each in qkv)),
        plain(f"{name}_attn.proj", f"{_OURS}.attn.{out}"),
        plain(f"{name}_mlp.0", f"{_OURS}.{feed_forward}.net.0.proj"),
        plain(f"{name}_mlp.2", f"{_OURS}.{feed_forward}.net.2"),
        plain(f"{name}_mod.lin", f"{_OURS}.{norm}.linear"),
    ]


# The feed-forward of a single block is four times as wide as the block (`mlp_ratio`, the same in every release).
_LINEAR1 = (
    *(Part(f"{_OUR_SINGLE}.attn.{each}") for each in ("to_q", "to_k", "to_v")),
    Part(f"{_OUR_SINGLE}.proj_mlp", 4),
)

FLUX = KeyTable(
    "flux",
    "transformer",
    [
        *_stream("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
        *_stream("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
        Entry(f"{_SINGLE}.linear1", _LINEAR1),
        plain(f"{_SINGLE}.linear2", f"{_OUR_SINGLE}.proj_out"),
        plain(f"{_SINGLE}.modulation.lin", f"{_OUR_SINGLE}.norm.linear"),
        plain("img_in", "x_embedder"),
        plain("txt_in", "context_embedder"),
        *(
            plain(f"{theirs}.{layer}", f"time_text_embed.{ours}.linear_{number}")
            for theirs, ours in _EMBEDDERS.items()
            for number, layer in ((1, "in_layer"), (2, "out_layer"))
        ),
        plain("final_layer.linear", "proj_out"),
        plain("final_layer.adaLN_modulation.1", "norm_out.linear", "always"),
    ],
    kohya_module="networks.lora_flux",
)
