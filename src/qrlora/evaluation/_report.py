"""The schema of `report.json`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

REPORT_VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measure(_Model):
    """A kind of score.

    Attributes:
        title: what the report calls it.
        metric, model: what computes it, and with which weights; both empty for what needs none.
        lowest, highest: between which it lies.
        better: which end is wanted.
        text: what the number is, in a sentence or two.
        other: what the picture of the other role scores, the style picture as content and the content picture as
            style: about what an unrelated picture gives. None where one of them was not given.
    """

    title: str
    metric: str
    model: str
    lowest: float
    highest: float
    better: Literal["higher", "lower"]
    text: str
    other: float | None = None


class Estimate(_Model):
    """A mean over `pictures` pictures, with the ends of its 95 % bootstrap interval; none of one picture."""

    mean: float
    low: float | None
    high: float | None
    pictures: int


class PictureScores(_Model):
    """One picture; `scores` by the names of the report's measures.

    `nearest` has the name of the nearest picture of the gallery, by metric.
    """

    name: str
    group: str
    prompt: str | None
    seed: int | None
    weights: dict[str, float]
    scores: dict[str, float]
    nearest: dict[str, str]


class Group(_Model):
    """Pictures that differ in seed and prompt alone, and their means by measure."""

    name: str
    weights: dict[str, float]
    means: dict[str, Estimate]


class Difference(_Model):
    """How much `group` has more than `base` on average, picture by picture of the same prompt and seed."""

    group: str
    base: str
    means: dict[str, Estimate]


class Drift(_Model):
    """`1 - cosine` of each prompt's two pictures by one metric, and their mean."""

    metric: str
    model: str
    prompts: list[str]
    seeds: list[int]
    values: list[float]
    mean: Estimate


class Report(_Model):
    """Everything that `report.html` shows, and more.

    Attributes:
        content, style: names of the pictures compared with.
        gallery: names of the things a picture can be taken for, and `wanted`, the right one, where names tell.
        centred: whether features are centred by the mean of the gallery in what says so.
        measures: by name, in the order of reading.
        seed, resamples: of the bootstrap.
    """

    format_version: int = REPORT_VERSION
    content: list[str]
    style: list[str]
    gallery: list[str]
    wanted: str | None
    centred: bool
    measures: dict[str, Measure]
    pictures: list[PictureScores]
    groups: list[Group]
    differences: list[Difference]
    drift: list[Drift]
    notes: list[str]
    seed: int
    resamples: int
