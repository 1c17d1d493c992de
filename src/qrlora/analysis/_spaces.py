"""Low-rank updates from their factors: norms, spectra, spaces and the angles between them. Pure torch, in float64.

The dense `dW = B A` is never formed: costs are those of the factors.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats import LowRank

RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Factors:
    """One layer's pair as two matrices `[channels, components]`, float64: `dW = output @ input^T`.

    Attributes:
        output: `lora_B`, `[out, r]`.
        input: `lora_A` transposed, `[in (* kh * kw), r]`.
    """

    output: Tensor
    input: Tensor

    @classmethod
    def of(cls, pair: LowRank) -> "Factors":
        return cls(pair.B.flatten(1).double(), pair.A.flatten(1).T.double())


@dataclass(frozen=True)
class UpdateSpace:
    """The singular value decomposition of an update, small values left out.

    Attributes:
        output: `[out, p]`, orthonormal: the output directions that the update writes to.
        input: `[in, p]`, orthonormal: the input directions it reads.
        spectrum: all singular values, descending, `[min(r, out, in)]`; the first p belong to the directions.
    """

    output: Tensor
    input: Tensor
    spectrum: Tensor


def update_space(factors: Factors) -> UpdateSpace:
    """The SVD of `dW` by two thin QR decompositions and an SVD of at most r x r.

    Directions whose singular value is below 1e-6 of the largest are rounding, and left out.
    """
    q_out, r_out = torch.linalg.qr(factors.output)
    q_in, r_in = torch.linalg.qr(factors.input)
    u, spectrum, vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    kept = int((spectrum > RANK_TOLERANCE * spectrum[0]).sum())
    return UpdateSpace(q_out @ u[:, :kept], q_in @ vh[:kept].T, spectrum)


def inner_product(one: Factors, two: Factors) -> float:
    """`<dW_1, dW_2> = tr((B_1^T B_2) (A_2 A_1^T))`."""
    return float(torch.sum((one.output.T @ two.output) * (one.input.T @ two.input)))


def update_cosine(one: Factors, two: Factors) -> float | None:
    """The cosine of the dense updates; None where one is zero.

    Independent random updates of an `out x in` weight have a standard deviation of `1 / sqrt(out * in)`; where both
    stand on one shared basis of r vectors, of `1 / sqrt(r * in)` (side output) or `1 / sqrt(out * r)` (side input).
    """
    size = math.sqrt(max(0.0, inner_product(one, one)) * max(0.0, inner_product(two, two)))
    return max(-1.0, min(1.0, inner_product(one, two) / size)) if size else None


def effective_rank(spectrum: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values: 1 up to their number, 0 for a zero update.

    Roy and Vetterli, "The effective rank" (2007).
    """
    total = spectrum.double().sum()
    if not float(total):
        return 0.0
    shares = spectrum.double() / total
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def principal_angles(one: Tensor, two: Tensor) -> list[float]:
    """All principal angles between two subspaces, ascending, in degrees.

    Angles above 45 degrees come from the cosines, the singular values of `one^T two`; those below from the sines, of
    what one space's principal vectors leave outside the other (Bjorck and Golub 1973, Knyazev and Argentati 2002): a
    cosine alone would lose everything below 1e-6 degrees.

    Args:
        one, two: `[d, p]` and `[d, q]`, orthonormal columns in float64.

    Returns:
        min(p, q) numbers from 0 to 90.

    Raises:
        QrloraError: the spaces are of different dimensions d.
    """
    if one.shape[0] != two.shape[0]:
        raise QrloraError(f"angles need subspaces of one space, not of {one.shape[0]} and {two.shape[0]} dimensions.")
    large, small = (one, two) if one.shape[1] >= two.shape[1] else (two, one)
    _, cosines, vh = torch.linalg.svd(large.T @ small, full_matrices=False)
    vectors = small @ vh.T
    # Columns are ordered by descending cosine; those of nearly equal cosine may mix, so sines are taken together too.
    sines = torch.linalg.svdvals(vectors - large @ (large.T @ vectors)).flip(0)
    by_sine = torch.asin(sines.clamp(0, 1))
    by_cosine = torch.acos(cosines.clamp(0, 1))
    return torch.rad2deg(torch.where(cosines**2 > 0.5, by_sine, by_cosine)).tolist()
