"""What is evaluated: pictures, and pairs of pictures that only adapters tell apart."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """A picture, and what is known of how it was made.

    Attributes:
        name: what the report calls it; no two of one report alike.
        image: RGB.
        group: whose mean it counts in, such as all seeds of the same adapters at the same weights.
        prompt, seed: that it was made with.
        text: what it should show, in plain words, for metrics that read; the prompt where None.
        weights: of the adapters it was made with, by name; 0 for one that is left out.
    """

    name: str
    image: Image.Image
    group: str = "pictures"
    prompt: str | None = None
    seed: int | None = None
    text: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class DriftPair:
    """Two pictures of one prompt and seed: by the base, and by the base with adapters."""

    prompt: str
    seed: int
    base: Image.Image
    adapted: Image.Image
