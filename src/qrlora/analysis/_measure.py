"""Every measure of one layer of two adapters, by name. Real pairs and random ones go through the same function."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qrlora.analysis._similarity import cosine, linear_cka, mutual_information
from qrlora.analysis._spaces import Factors, principal_angles
from qrlora.basis import Side

SHARED_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Kind:
    """What a layer's pair is made of, apart from its values.

    Attributes:
        rank: r.
        side: where the basis is; None for a plain LoRA.
        masked: only the triangle of the coefficients is trained.
    """

    rank: int
    side: Side | None
    masked: bool


@dataclass(frozen=True)
class Measured:
    """Values by name, and for those that are cosines the product of the two norms, so that layers can be pooled."""

    values: dict[str, float] = field(default_factory=dict[str, float])
    sizes: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def add(self, name: str, value: float | None) -> None:
        if value is not None:
            self.values[name] = value


def named_parts(factors: Factors, kind: Kind, other: Kind) -> dict[str, Tensor]:
    """The two factors, `[channels, components]`, by the names under which two adapters of these kinds compare.

    `Q` and `dR` where both have a basis on one side, otherwise `lora_B` and `lora_A`.
    """
    if kind.side is None or kind.side != other.side:
        return {"lora_B": factors.output, "lora_A": factors.input}
    if kind.side == "output":
        return {"Q": factors.output, "dR": factors.input}
    return {"Q": factors.input, "dR": factors.output}


def share_basis(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether the stored bases are one, to 1e-5 relative, as `merge` asks for its sum."""
    if "Q" not in one or one["Q"].shape != two["Q"].shape:
        return False
    return float((two["Q"] - one["Q"]).norm()) <= SHARED_TOLERANCE * float(one["Q"].norm())


def measure_parts(one: Mapping[str, Tensor], two: Mapping[str, Tensor], masked: bool) -> Measured:
    """`{part}.cosine`, `{part}.cka` and `{part}.nmi` of every part; only CKA where the ranks differ.

    Args:
        one, two: parts by name, `[channels, components]`.
        masked: both coefficients are triangular; the mutual information then leaves the masked entries out.
    """
    found = Measured()
    for name, x in one.items():
        y = two[name]
        found.add(f"{name}.cka", linear_cka(x, y))
        if x.shape != y.shape:
            continue
        found.add(f"{name}.cosine", cosine(x, y))
        found.sizes[f"{name}.cosine"] = (float(x.norm()), float(y.norm()))
        if masked and name == "dR":
            # Upper triangular lora_A, lower triangular lora_B: as [channels, components] both are lower triangular.
            free = torch.ones(x.shape, dtype=torch.bool).tril()
            x, y = x[free], y[free]
        found.add(f"{name}.nmi", mutual_information(x, y))
    return found


def measure_angles(name: str, one: Tensor, two: Tensor) -> tuple[list[float], Measured]:
    """All angles between two spaces, and `{name}.smallest`, `.largest` (degrees) and `.overlap` of them.

    The overlap is the mean squared cosine: how much of the smaller space lies in the larger one, in [0, 1]. Independent
    random spaces of p and q of d dimensions give `max(p, q) / d` on average.
    """
    angles = principal_angles(one, two)
    found = Measured()
    if angles:
        found.add(f"{name}.smallest", angles[0])
        found.add(f"{name}.largest", angles[-1])
        cosines = torch.cos(torch.deg2rad(torch.tensor(angles, dtype=torch.float64)))
        found.add(f"{name}.overlap", float(cosines.square().mean()))
    return angles, found
