"""Pictures drawn to be evaluated: by the base, by each adapter alone, by all of them, and of unrelated prompts."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qrlora.blend.painter import Painter
from qrlora.evaluation import DriftPair, Sample

BASE = "base"
DRIFT_SEED = 100_000_000
"""Added to the seeds of drift, so that none of them is one of the pictures', nor likely of a training's."""
_PROMPTS = (
    "a photo of a cat on a windowsill",
    "a photo of a mountain lake in the morning",
    "a bowl of fruit on a wooden table",
    "a portrait of an old fisherman",
    "a red double-decker bus in the rain",
    "a watercolour of a lighthouse",
    "a child's drawing of a house",
    "a steam locomotive crossing a bridge",
    "a white rabbit wearing a top hat",
    "a street market at night",
)
_EMBEDDED_PROMPTS = (
    "a pizza emoji in noto style",
    "a house emoji in twemoji style",
    "a guitar emoji in noto-blob style",
    "a penguin emoji in emojione2 style",
    "an umbrella emoji in fluent-flat style",
    "a cactus emoji in fluent-contrast style",
    "a cat face emoji in noto style",
    "a bicycle emoji in twemoji style",
    "a light bulb emoji in fluent-flat style",
    "a rainbow emoji in emojione2 style",
)


@dataclass(frozen=True)
class Trial:
    """What was drawn, in groups `base`, each adapter alone where there are several, and all of them.

    Attributes:
        samples: the pictures to be scored.
        drift: those of unrelated prompts, without and with all adapters.
    """

    samples: list[Sample]
    drift: list[DriftPair]


@dataclass(frozen=True)
class TrialAdapter:
    """An adapter file at its weight, within its timesteps unless they are all."""

    file: Path
    weight: float = 1.0
    timesteps: tuple[float, float] | None = None


def drift_prompts(model: str | None) -> tuple[str, ...]:
    """Ten prompts for a model, as many as peft's image benchmark has; None is the embedded base, which knows emoji."""
    return _EMBEDDED_PROMPTS if model is None else _PROMPTS


def draw_trial(
    painter: Painter,
    adapters: Mapping[str, TrialAdapter],
    prompts: Sequence[str],
    seeds: Sequence[int],
    unrelated: Sequence[str] = (),
    *,
    text: str | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trial:
    """Draw every prompt at every seed in every group, and every unrelated prompt twice.

    Args:
        painter: of the base; the adapters come off it again.
        adapters: by the names that groups get.
        prompts, seeds: of the pictures to be scored.
        unrelated: prompts for drift, each at a seed of its own.
        text: what the pictures should show, in plain words.
        folder: where the pictures are saved; nowhere where None.
        progress: called with (pictures done, pictures) after each.

    Raises:
        QrloraError: an adapter that cannot be read or is of another base, a weight or a range that is none.
    """
    groups: dict[str, list[str]] = {BASE: []}
    if len(adapters) > 1:
        groups |= {f"{name} {adapter.weight:g}": [name] for name, adapter in adapters.items()}
    together = ", ".join(f"{name} {adapter.weight:g}" for name, adapter in adapters.items())
    groups[together] = list(adapters)
    total = len(groups) * len(prompts) * len(seeds) + 2 * len(unrelated)
    names = {name: f"trial_{number}" for number, name in enumerate(adapters)}  # a file's name may be none for a module
    done = 0

    def paint(used: Sequence[str], prompt: str, seed: int, file: str) -> Image.Image:
        nonlocal done
        weights = {names[name]: adapters[name].weight for name in used}
        ranges = {names[name]: bounds for name in used if (bounds := adapters[name].timesteps) is not None}
        picture = painter.paint(prompt, seed, weights, ranges)
        if folder is not None:
            painter.save(picture, folder / f"{file}.png")
        done += 1
        if progress is not None:
            progress(done, total)
        return picture.image.convert("RGB")

    samples: list[Sample] = []
    drift: list[DriftPair] = []
    with ExitStack() as stack:
        for name, adapter in adapters.items():
            painter.attach(names[name], adapter.file)
            stack.callback(painter.detach, names[name])
        for number, (group, used) in enumerate(groups.items()):
            kind = BASE if not used else "all" if group == together else f"alone-{number}"
            weights = {name: adapters[name].weight if name in used else 0.0 for name in adapters}
            for place, prompt in enumerate(prompts, start=1):
                for seed in seeds:
                    file = f"{kind}-{place}-{seed}" if len(prompts) > 1 else f"{kind}-{seed}"
                    samples.append(Sample(file, paint(used, prompt, seed, file), group, prompt, seed, text, weights))
        for place, prompt in enumerate(unrelated, start=1):
            seed = DRIFT_SEED + seeds[0] + place
            before = paint((), prompt, seed, f"drift-{place}-base")
            drift.append(
                DriftPair(prompt, seed, before, paint(list(adapters), prompt, seed, f"drift-{place}-adapters"))
            )
    return Trial(samples, drift)
