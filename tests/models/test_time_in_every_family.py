"""Whatever a denoiser is told of time, ranges and rules by timestep mean the same noise for every family."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from qrlora.adapter import AdapterSpec, adapters_by_timestep, add_adapter
from qrlora.merging import adapters_by_rule
from qrlora.models import family_of
from tests.tiny_newer import (
    flux2_klein_pipeline,
    flux2_pipeline,
    qwen_image_pipeline,
    sd15_pipeline,
    z_image_pipeline,
)
from tests.tiny_pipelines import flux_pipeline, sd3_pipeline, sdxl_pipeline

STEPS = 5
LENGTHS = {"flux": 16, "sd3": 16, "sdxl": 77, "sd15": 77}
KINDS: dict[str, Callable[[], Any]] = {
    "flux": flux_pipeline,
    "sd3": sd3_pipeline,
    "sdxl": sdxl_pipeline,
    "sd15": sd15_pipeline,
    "flux2": flux2_pipeline,
    "flux2-klein": flux2_klein_pipeline,
    "qwen-image": qwen_image_pipeline,
    "z-image": z_image_pipeline,
}


@pytest.fixture(params=KINDS)
def pipeline(request: pytest.FixtureRequest) -> Any:
    made = KINDS[request.param]()
    add_adapter(family_of(made).denoiser(made), AdapterSpec(rank=2, basis="lora"), "content")
    return made


def timesteps_of(pipeline: Any) -> list[float]:
    """One picture without guidance, a call a step; the steps' noise as the scheduler counts it, up to 1000."""
    family = family_of(pipeline)
    off = {family.guided_by: family.guidance_off} if family.guidance_off < 2 else {}
    length = LENGTHS.get(family.name, 64)
    changes = {"height": 32, "width": 32, "num_inference_steps": STEPS, "max_sequence_length": length} | off
    settings = family.generation_defaults.model_copy(update=changes)
    assert not family.uses_negative(settings)
    family.generate(pipeline, ["a cat"], seeds=[5], **settings.model_dump())
    found = pipeline.scheduler.timesteps.double()
    assert len(found) >= STEPS
    assert bool((found[:-1] >= found[1:]).all())
    assert 700 < found[0] <= 1000
    return found.tolist()


class Recorder:
    """A rule that writes down how far the picture is, once a call."""

    def __init__(self, layer: str) -> None:
        self.layer, self.seen = layer, list[float]()

    def acting(self, layer: str, progress: float) -> Sequence[int]:
        if layer == self.layer:
            self.seen.append(progress)
        return (0,)


def first_adapted(denoiser: Any) -> tuple[str, Any]:
    return next((name, each) for name, each in denoiser.named_modules() if hasattr(each, "lora_A"))


@contextmanager
def acting_by_call(layer: Any) -> Iterator[list[bool]]:
    """Whether a layer's adapter acts in each of its calls."""
    seen: list[bool] = []
    handle = layer.register_forward_pre_hook(lambda each, _: seen.append(not each.disable_adapters))
    try:
        yield seen
    finally:
        handle.remove()


def test_a_rule_is_told_how_far_the_picture_is(pipeline: Any) -> None:
    family = family_of(pipeline)
    denoiser = family.denoiser(pipeline)
    name, _ = first_adapted(denoiser)
    rule = Recorder(name)
    with adapters_by_rule(denoiser, {"content": 1.0}, rule, partial(family.given_timesteps, pipeline)):
        timesteps = timesteps_of(pipeline)
    assert rule.seen == pytest.approx([1 - timestep / 1000 for timestep in timesteps], abs=1e-6)


def test_a_range_holds_the_steps_of_its_noise(pipeline: Any) -> None:
    family = family_of(pipeline)
    denoiser = family.denoiser(pipeline)
    _, layer = first_adapted(denoiser)
    given = partial(family.given_timesteps, pipeline)
    timesteps = timesteps_of(pipeline)
    middle = timesteps[len(timesteps) // 2]  # a bound belongs to its range
    for low, high in ((middle, 1000.0), (0.0, middle)):
        ranges = adapters_by_timestep(denoiser, {"content": 1.0}, {"content": (low, high)}, given)
        with ranges, acting_by_call(layer) as seen:
            assert timesteps_of(pipeline) == timesteps
        assert seen == [low <= timestep <= high for timestep in timesteps]
        assert set(seen) == {True, False}


def test_bounds_are_given_in_the_denoisers_own_count(pipeline: Any) -> None:
    """Noise in the order clean, half, whole, as each model's code counts it."""
    counts = {"flux": 1.0, "flux2": 1.0, "flux2-klein": 1.0, "qwen-image": 1.0}
    family = family_of(pipeline)
    given = family.given_timesteps(pipeline, torch.tensor([0.0, 500.0, 1000.0])).tolist()
    whole = counts.get(family.name, 1000.0)
    assert given == pytest.approx([1.0, 0.5, 0.0] if family.name == "z-image" else [0.0, whole / 2, whole])
