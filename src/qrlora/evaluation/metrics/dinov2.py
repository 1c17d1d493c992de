"""Content by DINOv2 (Oquab et al. 2023): the class token after the last norm, as in peft's image benchmark."""

from typing import Any, Self

from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, Dinov2Model

from qrlora.evaluation._metric import Metric, register_metric
from qrlora.evaluation._transformers import from_pretrained, network, source_of

DEFAULT_MODEL = "facebook/dinov2-base"


@register_metric("dinov2")
class Dinov2(Metric):
    """What a picture shows, by features that were learned without labels and tell one dog from another."""

    about = "the class token of a vision transformer that was trained without labels"
    aspects = ("content",)

    def __init__(self, model: str, network: Any, processor: Any) -> None:
        self.model, self.network, self.processor = model, network, processor

    @classmethod
    def load(cls, model: str | None) -> Self:
        source = source_of("dinov2", model or DEFAULT_MODEL)
        return cls(source, network("dinov2", Dinov2Model, source), from_pretrained(AutoImageProcessor, source))

    def _pixels(self, picture: Image.Image) -> Tensor:
        return self.processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=pixels).last_hidden_state[:, 0]
