"""Content and text by CLIP (Radford et al. 2021): the field's CLIP-I and CLIP-T."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from qrlora.evaluation._metric import Metric, register_metric
from qrlora.evaluation._transformers import from_pretrained, network, source_of

DEFAULT_MODEL = "openai/clip-vit-large-patch14"


@register_metric("clip")
class Clip(Metric):
    """Pictures and texts in one space; long texts are cut where the model's end."""

    about = "the common space of pictures and captions"
    aspects = ("content", "text")

    def __init__(self, model: str, network: Any, processor: Any, tokenizer: Any) -> None:
        self.model, self.network, self.processor, self.tokenizer = model, network, processor, tokenizer

    @classmethod
    def load(cls, model: str | None) -> Self:
        source = source_of("clip", model or DEFAULT_MODEL)
        made = network("clip", CLIPModel, source)
        return cls(source, made, *(from_pretrained(part, source) for part in (CLIPImageProcessor, AutoTokenizer)))

    def _pixels(self, picture: Image.Image) -> Tensor:
        return self.processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def _embed(self, pixels: Tensor) -> Tensor:
        model = self.network
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        model = self.network
        longest = model.config.text_config.max_position_embeddings
        words = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.no_grad():
            read = model.text_model(
                input_ids=words["input_ids"].to(self.device), attention_mask=words["attention_mask"].to(self.device)
            )
            return model.text_projection(read.pooler_output).float().cpu()
