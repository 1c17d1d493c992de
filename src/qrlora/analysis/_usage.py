"""How the gates of Freq-MoE adapters use their experts: entropy, and content against style.

A usage is `[layers, experts]`: the mean gate weights of a layer over tokens and steps, each row summing to 1.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from qrlora.adapter import GateUsage
from qrlora.errors import QrloraError

ROW_TOLERANCE = 1e-2
_MAX_FILE = 64 * 1024 * 1024


class ExpertUsage(BaseModel):
    """Mean gate weights of one adapter, as recorded while it made pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    layers: list[str] = Field(min_length=1)
    weights: list[list[float]] = Field(min_length=1)
    """One row a layer, one number an expert."""
    prompts: list[str] = []
    """Of the pictures that were drawn meanwhile, where they are known."""

    @model_validator(mode="after")
    def _rows_are_shares(self) -> Self:
        experts = len(self.weights[0])
        if len(self.weights) != len(self.layers):
            raise ValueError(f"{len(self.layers)} layers but {len(self.weights)} rows of weights")
        for layer, row in zip(self.layers, self.weights, strict=True):
            if len(row) != experts or experts < 2:
                raise ValueError(f"{layer} has {len(row)} experts; 2 or more, and as many in each layer, are expected")
            if not all(math.isfinite(value) and value >= 0 for value in row) or abs(sum(row) - 1) > ROW_TOLERANCE:
                raise ValueError(f"the weights of {layer} are not shares that sum to 1")
        return self

    @classmethod
    def of(cls, recorded: GateUsage, name: str, prompts: Sequence[str] = ()) -> "ExpertUsage":
        """What `record_usage` gathered.

        Raises:
            QrloraError: no token has passed its gates, or they are not finite.
        """
        try:
            return cls(name=name, layers=recorded.layers, weights=recorded.weights, prompts=list(prompts))
        except ValidationError as error:
            raise QrloraError(
                f"the gates of {name} gave no usage: {error.errors()[0]['msg']}; no token passed them, or what they "
                "make of it is not finite, as with an adapter whose training diverged."
            ) from error

    @classmethod
    def read(cls, path: str | Path) -> "ExpertUsage":
        """Read the JSON of `model_dump_json`.

        Raises:
            QrloraError: no such file, or it is something else.
        """
        source = Path(path)
        try:
            if source.stat().st_size > _MAX_FILE:
                raise QrloraError(f"{source} is larger than any expert usage; give the JSON that was recorded.")
            return cls.model_validate_json(source.read_bytes())
        except OSError as error:
            raise QrloraError(f"{source} cannot be read: {error.strerror or error}.") from error
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"]) or "content"
            raise QrloraError(f"{source} is no expert usage: its {where}: {problem['msg']}.") from error

    def matrix(self) -> Tensor:
        """`[layers, experts]`, float64, rows scaled to sum to exactly 1."""
        rows = torch.tensor(self.weights, dtype=torch.float64)
        return rows / rows.sum(dim=1, keepdim=True)


class UsageComparison(BaseModel):
    """Two usages over their common layers. Cosines of shares are high by nature: two gates that are random points of
    the simplex give `random_mean`, plus or minus `random_std`, in a layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int
    second: int
    layers: list[str]
    cosine: float
    """Of the two whole matrices as long vectors."""
    random_mean: float
    random_std: float
    layer_cosines: list[float]
    mean_difference: list[float]
    """Of each expert's share, first minus second, over the layers."""
    difference: list[list[float]]
    """`[layers, experts]`, first minus second."""


class UsageReport(BaseModel):
    """All usages, their entropies and comparisons."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    usages: list[ExpertUsage]
    entropies: list[list[float]]
    """A list a usage, a number a layer: 0 where one expert does everything, 1 where all are used alike."""
    expert_means: list[list[float]]
    """A list a usage, a number an expert: its mean share over the layers."""
    comparisons: list[UsageComparison]


def usage_entropy(usage: Tensor) -> Tensor:
    """Entropy of each row of `[layers, experts]` over its maximum, `log(experts)`: `[layers]`, in [0, 1]."""
    return -torch.special.xlogy(usage, usage).sum(dim=1) / math.log(usage.shape[1])


def usage_cosines(one: Tensor, two: Tensor) -> Tensor:
    """Cosine of each pair of rows of two `[layers, experts]`: `[layers]`."""
    return torch.nn.functional.cosine_similarity(one, two, dim=1)


def random_usage_cosine(experts: int) -> tuple[float, float]:
    """Mean and deviation of the cosine of two independent uniform points of the simplex, by 20,000 seeded draws."""
    generator = torch.Generator().manual_seed(experts)
    points = torch.empty(2, 20_000, experts, dtype=torch.float64).exponential_(generator=generator)
    cosines = usage_cosines(points[0], points[1])
    return float(cosines.mean()), float(cosines.std())


def are_comparable(one: ExpertUsage, two: ExpertUsage) -> bool:
    """Whether two usages have a common layer, and as many experts."""
    return not set(one.layers).isdisjoint(two.layers) and len(one.weights[0]) == len(two.weights[0])


def compare_usage(usages: Sequence[ExpertUsage], first: int, second: int) -> UsageComparison:
    """Content against style: the two usages over the layers they have in common, in the order of the first.

    Raises:
        QrloraError: no common layer, or other numbers of experts.
    """
    one, two = usages[first], usages[second]
    if not are_comparable(one, two):
        raise QrloraError(
            f"the expert usages of {one.name} and {two.name} do not compare: they need a common layer and as many "
            "experts."
        )
    common = [layer for layer in one.layers if layer in set(two.layers)]
    rows = [usage.matrix()[[usage.layers.index(layer) for layer in common]] for usage in (one, two)]
    difference = rows[0] - rows[1]
    random_mean, random_std = random_usage_cosine(difference.shape[1])
    return UsageComparison(
        first=first,
        second=second,
        layers=common,
        cosine=float(torch.nn.functional.cosine_similarity(rows[0].flatten(), rows[1].flatten(), dim=0)),
        random_mean=random_mean,
        random_std=random_std,
        layer_cosines=usage_cosines(rows[0], rows[1]).tolist(),
        mean_difference=difference.mean(dim=0).tolist(),
        difference=difference.tolist(),
    )


def report_usage(usages: Sequence[ExpertUsage]) -> UsageReport:
    """Everything about some usages; all pairs that `are_comparable` are compared."""
    pairs = [pair for pair in combinations(range(len(usages)), 2) if are_comparable(*(usages[index] for index in pair))]
    return UsageReport(
        usages=list(usages),
        entropies=[usage_entropy(usage.matrix()).tolist() for usage in usages],
        expert_means=[usage.matrix().mean(dim=0).tolist() for usage in usages],
        comparisons=[compare_usage(usages, first, second) for first, second in pairs],
    )
