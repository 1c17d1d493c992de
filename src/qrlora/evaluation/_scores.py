"""The mathematics of the scores: cosines of features, nothing else. Every function works in float64."""

from torch import Tensor
from torch.nn import functional as F


def similarity(features: Tensor, references: Tensor, centre: Tensor | None = None) -> Tensor:
    """The mean cosine of each feature with several references (DreamBooth, Ruiz et al. 2023, section 4.2).

    Args:
        features: `[N, d]`.
        references: `[M, d]`.
        centre: `[d]`, taken off both sides first; what all pictures have in common then counts no more.

    Returns:
        `[N]`, -1 to 1.
    """
    return _cosines(features, references, centre).mean(dim=1)


def distance(features: Tensor, others: Tensor, centre: Tensor | None = None) -> Tensor:
    """`1 - cosine` of rows at the same place, `[N, d]` each, perhaps centred; 0 to 2."""
    one, other = _centred(features, centre), _centred(others, centre)
    return 1 - (F.normalize(one, dim=1) * F.normalize(other, dim=1)).sum(dim=1)


def nearest(features: Tensor, gallery: Tensor, centre: Tensor | None = None) -> Tensor:
    """For each feature `[N, d]` the place of the row of `gallery` `[M, d]` of the largest cosine; `[N]` int64."""
    return _cosines(features, gallery, centre).argmax(dim=1)


def _cosines(features: Tensor, others: Tensor, centre: Tensor | None) -> Tensor:
    return F.normalize(_centred(features, centre), dim=1) @ F.normalize(_centred(others, centre), dim=1).T


def _centred(features: Tensor, centre: Tensor | None) -> Tensor:
    return features.double() if centre is None else features.double() - centre.double()
