"""FLUX.2: the names of Black Forest Labs' code, which kohya's musubi-tuner and ComfyUI share.

Sources: `DoubleStreamBlock`, `SingleStreamBlock` and `LastLayer` in `src/flux2/model.py` of
https://github.com/black-forest-labs/flux2; diffusers' converters of checkpoints and of kohya's files. Many names are
FLUX.1's; what they hold differs in the feed-forward, which is gated here, and in single blocks, whose queries, keys,
values and feed-forward are one layer in diffusers too.
"""

from collections.abc import Mapping

from qrlora.formats.keys._table import Entry, KeyTable, Part, plain

_DOUBLE, _OURS = "double_blocks.{}", "transformer_blocks.{}"
_SINGLE, _OUR_SINGLE = "single_blocks.{}", "single_transformer_blocks.{}.attn"
_EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}
_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")


def _stream(stream: str, qkv: tuple[str, str, str], out: str, feed_forward: str) -> list[Entry]:
    name = f"{_DOUBLE}.{stream}"
    return [
        Entry(f"{name}_attn.qkv", tuple(Part(f"{_OURS}.attn.{each}") for each in qkv)),
        plain(f"{name}_attn.proj", f"{_OURS}.attn.{out}"),
        plain(f"{name}_mlp.0", f"{_OURS}.{feed_forward}.linear_in"),
        plain(f"{name}_mlp.2", f"{_OURS}.{feed_forward}.linear_out"),
    ]


FLUX2 = KeyTable(
    "flux2",
    "transformer",
    [
        *_stream("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
        *_stream("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
        plain(f"{_SINGLE}.linear1", f"{_OUR_SINGLE}.to_qkv_mlp_proj"),
        plain(f"{_SINGLE}.linear2", f"{_OUR_SINGLE}.to_out"),
        *(plain(f"{each}.lin", f"{each}.linear") for each in _MODULATIONS),
        plain("img_in", "x_embedder"),
        plain("txt_in", "context_embedder"),
        *(
            plain(f"{theirs}.{layer}", f"time_guidance_embed.{ours}.linear_{number}")
            for theirs, ours in _EMBEDDERS.items()
            for number, layer in ((1, "in_layer"), (2, "out_layer"))
        ),
        plain("final_layer.linear", "proj_out"),
        plain("final_layer.adaLN_modulation.1", "norm_out.linear", "always"),
    ],
    kohya_module="networks.lora_flux_2",
)

# How many times as long one side of a weight is as the other, where FLUX.1's layer of that name has another ratio:
# 4, 4, 7 and 5.
_RATIOS: Mapping[str, int] = {"mlp.0": 6, "mlp.2": 3, "linear1": 9, "linear2": 4}


def is_flux2(shape: tuple[int, int], name: str) -> bool:
    """Whether a layer of a name that FLUX.1 has too is FLUX.2's, by the shape `[out, in]` of its weight."""
    ratio = next((ratio for end, ratio in _RATIOS.items() if name.endswith(end)), None)
    return ratio is not None and max(shape) == ratio * min(shape)
