"""ICA-LoRA's two bases: the mixing matrix on the input side, the sources on the output side."""

import math

from qrlora.basis._ica import ica_seconds, independent_components
from qrlora.basis._registry import BasisColumns, BasisRequest, register_basis


def _centred(d: int, n: int) -> int:
    """Centring takes one dimension."""
    return min(d, n) - 1


@register_basis("ica", limit=_centred, orthonormal=False, seconds=ica_seconds)
def ica(request: BasisRequest) -> BasisColumns:
    """Factors of one FastICA of W, `W = S A^T + ...`: `A [in, r]` for side input, `S [out, r]` for side output.

    ICA-LoRA (QR-LoRA's Stable Diffusion 3 fork) freezes A and trains dS, its second version freezes S and trains dA.
    The angle is the one by which the last iteration still turned a component.
    """
    weight = request.matrix if request.side == "output" else request.matrix.T
    found = independent_components(weight, request.rank, layer=request.layer)
    angle = math.degrees(math.acos(max(0.0, 1 - found.drift)))
    return BasisColumns(found.sources if request.side == "output" else found.mixing, "fastica", angle)
