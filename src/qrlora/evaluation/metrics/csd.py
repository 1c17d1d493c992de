"""Style by CSD, contrastive style descriptors (Somepalli et al. 2024): CLIP's picture tower, trained on, and a style
head.

The weights are read from one safetensors file with the authors' own names, perhaps behind `module.`: `backbone.` with
OpenAI's names of a CLIP vision tower without its projection (`conv1.weight`, `class_embedding`,
`positional_embedding`, `ln_pre`, `transformer.resblocks.N`, `ln_post`), `last_layer_style` [width, d], and
`last_layer_content`, which is not used. Heads are of 64 channels, as in every CLIP tower of OpenAI's.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from qrlora.errors import QrloraError
from qrlora.evaluation._metric import Metric, register_metric
from qrlora.evaluation._transformers import source_of
from qrlora.formats import read_safetensors
from qrlora.models import told

FILE = "model.safetensors"
HEAD, HEAD_CHANNELS = "last_layer_style", 64
_BACKBONE = "backbone."
_NAMES = {
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@register_metric("csd")
class Csd(Metric):
    """How a picture is made, whatever it shows, by a model that was trained to tell artists' styles."""

    about = "the style head of a CLIP tower that was trained to tell styles apart"
    aspects = ("style",)

    def __init__(self, model: str, network: Any, head: Tensor) -> None:
        side = network.config.image_size
        self.model, self.network, self.head = model, network, head
        self.processor: Any = CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )

    @classmethod
    def load(cls, model: str | None) -> Self:
        if model is None:
            raise QrloraError(
                f"the metric csd has no model of its own; give the folder, file or hub id of its weights as {FILE} "
                "(--metric-model csd=FOLDER)."
            )
        file = _file(model)
        tensors = {key.removeprefix("module."): value for key, value in read_safetensors(file)[0].items()}
        try:
            return cls(model, _tower(tensors), tensors[HEAD].float())
        except (KeyError, RuntimeError, ValueError) as error:
            raise QrloraError(
                f"metric csd: {file} has not the weights of CSD ({str(error).splitlines()[0]}); it needs {_BACKBONE}* "
                f"with OpenAI's names of a CLIP tower, and {HEAD}."
            ) from error

    def _pixels(self, picture: Image.Image) -> Tensor:
        return self.processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=pixels).pooler_output @ self.head.to(pixels.device)


def _file(model: str) -> Path:
    if Path(model).is_file():
        return Path(model)
    source = source_of("csd", model)
    if not Path(source).is_dir():
        return Path(told(source, lambda: hf_hub_download(source, FILE)))
    if not (Path(source) / FILE).is_file():
        raise QrloraError(f"metric csd: {source} holds no {FILE}; put the weights there as safetensors.")
    return Path(source) / FILE


def _tower(tensors: Mapping[str, Tensor]) -> CLIPVisionModel:
    """The tower in the shape that its weights have, as transformers names them."""
    given = {key.removeprefix(_BACKBONE): value for key, value in tensors.items() if key.startswith(_BACKBONE)}
    width, _, patch, _ = given["conv1.weight"].shape
    blocks = {key.split(".")[2] for key in given if key.startswith("transformer.resblocks.")}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=given["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=len(blocks),
        num_attention_heads=max(1, width // HEAD_CHANNELS),
        image_size=patch * math.isqrt(given["positional_embedding"].shape[0] - 1),
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    named: dict[str, Tensor] = {}
    for key, value in given.items():
        if key != "proj":
            named |= _renamed(key, value.float())
    tower = CLIPVisionModel(config)
    inner = "vision_model." if any(key.startswith("vision_model.") for key in tower.state_dict()) else ""
    tower.load_state_dict({inner + key: value for key, value in named.items()})
    return tower.eval().requires_grad_(False)


def _renamed(key: str, value: Tensor) -> dict[str, Tensor]:
    stem, _, kind = key.rpartition(".")
    if not key.startswith("transformer.resblocks."):
        return {_NAMES[key] if key in _NAMES else f"{_NAMES[stem]}.{kind}": value}
    _, _, number, rest = key.split(".", 3)
    block = f"encoder.layers.{number}"
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{block}.self_attn.{part}_proj.{kind}": each for part, each in parts}
    stem, _, kind = rest.rpartition(".")
    return {f"{block}.{_BLOCK_NAMES[stem]}.{kind}": value}
