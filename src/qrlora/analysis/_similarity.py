"""How alike two matrices are: cosine, linear CKA, normalised mutual information. Pure torch, in float64.

A matrix here is `[channels, components]`: a row for each output (or input) channel of the layer, a column for each of
the r components of the low-rank pair. None means that the measure is not defined (a constant or zero matrix).
"""

import math

import torch
from torch import Tensor

MAX_BINS = 32
VALUES_A_CELL = 8


def cosine(x: Tensor, y: Tensor) -> float | None:
    """`<x, y> / (|x| |y|)` of two tensors of one shape, as long vectors; in [-1, 1].

    Independent random matrices of N entries give 0 on average with a standard deviation of `1 / sqrt(N)`.
    """
    x, y = x.double(), y.double()
    size = float(x.norm()) * float(y.norm())
    return float((x * y).sum()) / size if size else None


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment of `x [channels, p]` and `y [channels, q]` (Kornblith et al. 2019, eq. 5).

    `||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)` with centred columns: in [0, 1], 1 for matrices that differ by a
    rotation of the components and a scale alone. Independent Gaussian matrices of n channels give about
    `sqrt(p q / ((n + p) (n + q)))`, so a narrow layer looks alike by chance.
    """
    x, y = x.double(), y.double()
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    size = float((x.T @ x).norm()) * float((y.T @ y).norm())
    return float((y.T @ x).square().sum()) / size if size else None


def bin_count(values: int) -> int:
    """Bins an axis for `values` pairs of numbers: on average at least 8 pairs a cell, between 2 and 32 bins."""
    return max(2, min(MAX_BINS, math.isqrt(values // VALUES_A_CELL)))


def mutual_information(x: Tensor, y: Tensor) -> float | None:
    """Normalised mutual information `I(x; y) / sqrt(H(x) H(y))` of the entries of two tensors of one shape, in [0, 1].

    Strehl and Ghosh (2002), of a joint histogram with `bin_count` bins an axis. The bins hold equally many entries
    (quantiles), so the result does not depend on the distribution of the values, nor on any monotone scale, and
    outliers do not empty it; equal values stay together. A histogram of finitely many values is never quite flat: N
    pairs of independent values in b bins give about `(b - 1)^2 / (2 N log b)` instead of 0 (Miller 1955), which the
    random baseline shows.
    """
    bins = bin_count(x.numel())
    joint = torch.zeros(bins, bins, dtype=torch.float64)
    cells = _binned(x, bins) * bins + _binned(y, bins)
    joint.view(-1).copy_(torch.bincount(cells, minlength=bins * bins))
    joint /= joint.sum()
    entropy_x, entropy_y = _entropy(joint.sum(dim=1)), _entropy(joint.sum(dim=0))
    if entropy_x <= 0 or entropy_y <= 0:
        return None
    shared = entropy_x + entropy_y - _entropy(joint.flatten())
    return min(1.0, max(0.0, shared / math.sqrt(entropy_x * entropy_y)))


def _binned(values: Tensor, bins: int) -> Tensor:
    flat = values.detach().flatten()
    ordered = flat.sort().values
    edges = ordered[torch.arange(1, bins, device=flat.device) * len(flat) // bins]
    return torch.searchsorted(edges, flat, right=True)


def _entropy(probabilities: Tensor) -> float:
    """In nats."""
    return -float(torch.special.xlogy(probabilities, probabilities).sum())
