"""The schema of `report.json`. Numbers are plain; a measure that is not defined somewhere is left out there."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qrlora.analysis._usage import UsageReport
from qrlora.formats import Component

REPORT_VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measure(_Model):
    """A value beside what independent random matrices of the same shapes give (mean and standard deviation)."""

    value: float
    random_mean: float | None
    random_std: float | None


class Total(Measure):
    """A measure of a whole adapter: cosines are those of all layers taken as one long vector, others are means.

    `mean`, `std`, `min` and `max` are over the `layers` layers where the measure is defined.
    """

    mean: float
    std: float
    min: float
    max: float
    layers: int


class LayerPair(_Model):
    """One layer of two adapters. The names of `measures`:

    `update.cosine`: of the dense updates. `{part}.cosine`, `.cka`, `.nmi` of the parts `Q`, `dR`, `R` (or `lora_B`,
    `lora_A` where the two have no basis on one side) and `gate` (weights of gated adapters). `output.smallest`,
    `.largest` (degrees), `.overlap` (mean squared cosine) of the principal angles between the spaces the updates write
    to, `input.*` between those they read.
    """

    layer: str
    shape: tuple[int, ...]
    """Of the weight."""
    ranks: tuple[int, int]
    shared_basis: bool
    norms: tuple[float, float]
    measures: dict[str, Measure]
    output_angles: list[float]
    """Degrees, ascending."""
    input_angles: list[float]


class Pair(_Model):
    """Two adapters, by their places in `adapters`; norms are over the layers they have in common."""

    first: int
    second: int
    norms: tuple[float, float]
    mergeable: bool
    """Whether merge takes them: low-rank pairs on the same layers of one base model."""
    norm_ratio: float | None
    """Larger to smaller; null where an update is zero."""
    total: dict[str, Total]
    layers: list[LayerPair]
    only_first: list[str]
    only_second: list[str]
    other_shape: list[str]
    """Layers that both adapt, but of weights of different shapes."""
    notes: list[str]
    """What the numbers say, in sentences."""


class LayerFacts(_Model):
    layer: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    """Frobenius norm of the update."""
    effective_rank: float
    """Exponential of the entropy of the normalised spectrum; 0 for a zero update."""
    spectrum: list[float]
    """Singular values of the update, descending."""


class AdapterFacts(_Model):
    name: str
    file: str | None
    component: Component
    basis: str | None
    side: Literal["output", "input"] | None
    mask: Literal["full", "upper"]
    base_model: str | None
    trigger_words: list[str]
    rank: int
    """The largest over the layers."""
    norm: float
    layers: list[LayerFacts]


class RandomSettings(_Model):
    """How the random baseline was drawn."""

    seed: int
    draws: int = Field(gt=1)


class Report(_Model):
    """Everything that `report.html` shows, and more."""

    format_version: int = REPORT_VERSION
    adapters: list[AdapterFacts]
    pairs: list[Pair]
    random: RandomSettings
    notes: list[str]
    """What concerns the report as a whole: what was left out, and why."""
    usage: UsageReport | None = None
