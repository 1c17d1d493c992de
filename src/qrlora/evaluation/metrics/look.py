"""Style, offline: histograms of colours and of how they meet, in a small copy of the picture.

Chosen by a measurement: which of 12 emoji sets a picture is from is told by one picture of each no worse than with Gram
matrices or channel statistics of any layer of EfficientNet, which see the thing three times as much; docs/evaluation.md
has the figures.
"""

from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qrlora.data import square
from qrlora.errors import QrloraError
from qrlora.evaluation._metric import Metric, register_metric
from qrlora.evaluation._statistics import picture_statistics

SIDE = 64


@register_metric("look")
class Look(Metric):
    """Cosines of square roots of histograms, that is their Bhattacharyya coefficients, averaged."""

    about = f"histograms of colours, edges and neighbouring pixels of a {SIDE} x {SIDE} copy (no brushwork)"
    aspects = ("style",)
    lowest = 0.0
    model = "no network"

    @classmethod
    def load(cls, model: str | None) -> Self:
        if model is not None:
            raise QrloraError(f"the metric look takes no model, but {model} was given; leave it out.")
        return cls()

    def _pixels(self, picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture if picture.size == (SIDE, SIDE) else square(picture, SIDE)))

    def _embed(self, pixels: Tensor) -> Tensor:
        return picture_statistics(pixels)
