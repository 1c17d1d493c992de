"""The names of Stability AI's U-Nets, derived by rule from the shape of the network.

Sources: `UNetModel` in `sgm/modules/diffusionmodules/openaimodel.py` of
https://github.com/Stability-AI/generative-models, which is that of Stable Diffusion 1 with other numbers;
`unet_to_diffusers` and its tables in ComfyUI's `comfy/utils.py`. The rule: `input_blocks` counts the first convolution,
then each level's two residual blocks and its downsampler; `output_blocks` counts three a level. Within a block the
residual part is 0, the attention 1, an upsampler the last.
"""

from collections.abc import Collection, Iterator, Mapping

from qrlora.formats.keys._table import Entry, plain

_RESNETS_A_LEVEL = 2
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = (
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.{{}}.{attn}.{each}" for attn in ("attn1", "attn2") for each in ("to_q", "to_k", "to_v")),
    *(f"transformer_blocks.{{}}.{attn}.to_out.0" for attn in ("attn1", "attn2")),
    "transformer_blocks.{}.ff.net.0.proj",
    "transformer_blocks.{}.ff.net.2",
)
_BASIC = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
}


def unet_entries(
    levels: int, down_attention: Collection[int], up_attention: Collection[int], more: Mapping[str, str]
) -> Iterator[Entry]:
    """Every layer of a U-Net with two residual blocks a level.

    Args:
        levels: of resolution.
        down_attention: those that have attention on the way down, from 0.
        up_attention: those on the way up, from 0.
        more: original name to diffusers path of layers that others do not have.
    """
    for name, path in {**_BASIC, **more}.items():
        yield plain(name, path)
    for level in range(levels):
        yield from _down(level, level < levels - 1, level in down_attention)
        yield from _up(level, level < levels - 1, level in up_attention)
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _resnet("middle_block.2", "mid_block.resnets.1")


def _resnet(name: str, path: str) -> Iterator[Entry]:
    for theirs, ours in _RESNET.items():
        yield plain(f"{name}.{theirs}", f"{path}.{ours}")


def _attention(name: str, path: str) -> Iterator[Entry]:
    for layer in _ATTENTION:
        yield plain(f"{name}.{layer}", f"{path}.{layer}")


def _down(level: int, sampled: bool, attention: bool) -> Iterator[Entry]:
    path, first = f"down_blocks.{level}", 1 + level * (_RESNETS_A_LEVEL + 1)
    for index in range(_RESNETS_A_LEVEL):
        yield from _resnet(f"input_blocks.{first + index}.0", f"{path}.resnets.{index}")
        if attention:
            yield from _attention(f"input_blocks.{first + index}.1", f"{path}.attentions.{index}")
    if sampled:
        yield plain(f"input_blocks.{first + _RESNETS_A_LEVEL}.0.op", f"{path}.downsamplers.0.conv")


def _up(level: int, sampled: bool, attention: bool) -> Iterator[Entry]:
    path, first = f"up_blocks.{level}", level * (_RESNETS_A_LEVEL + 1)
    for index in range(_RESNETS_A_LEVEL + 1):
        yield from _resnet(f"output_blocks.{first + index}.0", f"{path}.resnets.{index}")
        if attention:
            yield from _attention(f"output_blocks.{first + index}.1", f"{path}.attentions.{index}")
    if sampled:
        place = 2 if attention else 1
        yield plain(f"output_blocks.{first + _RESNETS_A_LEVEL}.{place}.conv", f"{path}.upsamplers.0.conv")
