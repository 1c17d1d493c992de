"""What independent random matrices of the same shapes give, by seeded Monte Carlo."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

import torch
from torch import Tensor

from qrlora.analysis._measure import Kind, measure_angles, measure_parts, named_parts
from qrlora.analysis._spaces import Factors, update_cosine


@dataclass(frozen=True)
class Chance:
    """Mean and standard deviation of a measure over random draws."""

    mean: float
    std: float


@dataclass(frozen=True)
class Shapes:
    """All that the baseline of a layer depends on.

    Attributes:
        out, inputs: of the weight as a matrix.
        kinds: of the two pairs.
        directions: dimensions of the two update spaces, at most the ranks.
        shared: both stand on one basis.
        experts: of the gates, where both have one.
    """

    out: int
    inputs: int
    kinds: tuple[Kind, Kind]
    directions: tuple[int, int]
    shared: bool
    experts: int = 0


class Baselines:
    """Random baselines by shape, each computed once.

    Random pairs are what an untrained pair of the kind would be: a basis uniform among orthonormal ones, Gaussian
    coefficients (triangular where masked), Gaussian factors for a plain LoRA, all independent. Where the two adapters
    share their basis, so do the random ones for the cosine of the updates; the other measures keep independent bases,
    as what one would see if nothing were shared.
    """

    def __init__(self, seed: int = 0, draws: int = 32) -> None:
        """`draws` pairs a shape (at least 2); the same seed gives the same numbers."""
        self.seed, self.draws = seed, draws
        self._known: dict[Shapes, Mapping[str, Chance]] = {}

    def of(self, shapes: Shapes) -> Mapping[str, Chance]:
        """Chance values by the names of the measures."""
        if shapes not in self._known:
            digest = hashlib.sha256(f"{self.seed} {shapes}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            drawn: defaultdict[str, list[float]] = defaultdict(list)
            for _ in range(self.draws):
                for name, value in _draw(shapes, generator).items():
                    drawn[name].append(value)
            self._known[shapes] = {name: _chance(name, values) for name, values in drawn.items()}
        return self._known[shapes]


def _chance(name: str, values: list[float]) -> Chance:
    if name.endswith(".cosine"):
        # As likely positive as negative: each draw counts with both signs, so the mean is 0, not the draws' own noise.
        return Chance(0.0, sqrt(fmean(value**2 for value in values)))
    return Chance(fmean(values), stdev(values))


def _draw(shapes: Shapes, generator: torch.Generator) -> dict[str, float]:
    one, two = (_pair(shapes, kind, generator) for kind in shapes.kinds)
    first, second = shapes.kinds
    parts = named_parts(one, first, second), named_parts(two, second, first)
    masked = first.masked and second.masked
    values = dict(measure_parts(*parts, masked).values)
    if "dR" in parts[0]:
        # R = Q^T W is a full matrix of the same shape as dR.
        full = [{"R": _normal(part["dR"].shape, generator)} for part in parts]
        values |= measure_parts(full[0], full[1], masked=False).values
    if shapes.experts:
        gates = [{"gate": _normal((shapes.inputs, shapes.experts), generator)} for _ in range(2)]
        values |= measure_parts(gates[0], gates[1], masked=False).values
    if shapes.shared:
        two = Factors(one.output, two.input) if first.side == "output" else Factors(two.output, one.input)
    cosine = update_cosine(one, two)
    if cosine is not None:
        values["update.cosine"] = cosine
    for name, dimension in (("output", shapes.out), ("input", shapes.inputs)):
        if min(shapes.directions):
            spaces = (_orthonormal(dimension, directions, generator) for directions in shapes.directions)
            values |= measure_angles(name, *spaces)[1].values
    return values


def _pair(shapes: Shapes, kind: Kind, generator: torch.Generator) -> Factors:
    sides: dict[str, Tensor] = {}
    for side, dimension in (("output", shapes.out), ("input", shapes.inputs)):
        if side == kind.side and kind.rank <= dimension:
            sides[side] = _orthonormal(dimension, kind.rank, generator)
        else:
            gaussian = _normal((dimension, kind.rank), generator)
            sides[side] = gaussian.tril() if kind.masked else gaussian
    return Factors(sides["output"], sides["input"])


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _orthonormal(dimension: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniform among all orthonormal `[dimension, columns]`: QR of a Gaussian with positive R (Mezzadri 2007)."""
    q, r = torch.linalg.qr(_normal((dimension, columns), generator))
    return q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
