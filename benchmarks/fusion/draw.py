"""Pictures of many adapters in one pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.fusion.many import Stack, carrying, stacked
from benchmarks.fusion.schedule import Schedule, following
from qrlora.formats import Adapter
from qrlora.models import LoadedModel


@dataclass(frozen=True)
class Picture:
    """One picture to draw: a prompt, a seed, and adapters with their weights, none for the base; a schedule, if any."""

    prompt: str
    seed: int
    adapters: tuple[tuple[Adapter, float], ...] = ()
    schedule: Schedule | None = None


def passes(model: LoadedModel) -> int:
    """Through the denoiser for one picture."""
    return model.defaults.num_inference_steps * (2 if model.defaults.true_cfg_scale > 1 else 1)


def draw(
    model: LoadedModel,
    pictures: Sequence[Picture],
    *,
    together: int = 12,
    on_drawn: Callable[[int], None] | None = None,
) -> np.ndarray:
    """uint8 `[N, H, W, 3]`, by the model's own settings.

    Args:
        model: the base, without adapters.
        pictures: all with the same number of adapters.
        together: pictures in one pass.
        on_drawn: called with how many a pass drew.
    """
    made: list[Image.Image] = []
    for start in range(0, len(pictures), together):
        part = pictures[start : start + together]
        layers = _stacks(part)
        with (
            carrying(model.denoiser, layers, len(part)),
            following(model.denoiser, layers, [picture.schedule for picture in part]),
        ):
            made += model.family.generate(
                model.pipeline,
                [picture.prompt for picture in part],
                seeds=[picture.seed for picture in part],
                batch_size=len(part),
                **model.defaults.model_dump(),
            )
        if on_drawn is not None:
            on_drawn(len(part))
    return np.stack([np.asarray(picture.convert("RGB")) for picture in made])


def _stacks(pictures: Sequence[Picture]) -> dict[str, list[Stack]]:
    """The stacks of every layer, in the order in which the adapters are attached."""
    layers: dict[str, list[Stack]] = {}
    for place in range(len(pictures[0].adapters)):
        adapters, weights = zip(*(picture.adapters[place] for picture in pictures), strict=True)
        for name, stack in stacked(adapters, weights).items():
            layers.setdefault(name, []).append(stack)
    return layers
