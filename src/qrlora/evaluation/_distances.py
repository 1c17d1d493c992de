"""Distances of pictures that need no network."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qrlora.evaluation._statistics import picture_statistics

SCALES = 4


def multiscale(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of colours and of their gradients, in equal parts, at full size and halved three times.

    Args:
        one, other: `[N, 3, H, W]` in [0, 1], sides of 16 pixels at least.

    Returns:
        `[N]`, 0 for equal pictures, 1 at the most.
    """
    total = torch.zeros(len(one))
    for scale in range(SCALES):
        if scale:
            one, other = F.avg_pool2d(one, 2), F.avg_pool2d(other, 2)
        across, down = ((one.diff(dim=dim) - other.diff(dim=dim)).abs() for dim in (3, 2))
        colours = (one - other).abs().flatten(1).mean(1)
        total += (colours + (across.flatten(1).mean(1) + down.flatten(1).mean(1)) / 2) / 2
    return total / SCALES


def hellinger(pictures: np.ndarray, others: np.ndarray) -> Tensor:
    """Hellinger distance of the histograms of `picture_statistics`, their Bhattacharyya coefficients averaged.

    Args:
        pictures, others: uint8 `[N, H, W, 3]`.

    Returns:
        `[N]`, 0 for equal histograms, 1 where they have no bin in common.
    """
    one, other = (picture_statistics(torch.from_numpy(np.ascontiguousarray(each))) for each in (pictures, others))
    count = one.square().sum(dim=1)  # each histogram sums to 1, so this is how many there are
    return (1 - (one * other).sum(dim=1) / count).clamp(min=0).sqrt()
