"""Z-Image: what we hand to the denoiser and get from it is what the stock pipeline does."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qrlora.adapter import (
    AdapterSpec,
    adapters_by_timestep,
    add_adapter,
    remove_adapter,
    target_layers,
    trainable_parameters,
)
from qrlora.models import family_of
from tests.tiny_newer import LENGTH, NEWER_GENERATION, z_image_pipeline, z_image_transformer

SETTINGS: dict[str, Any] = {**NEWER_GENERATION, "num_inference_steps": 3, "guidance_scale": 3.0}
PROMPTS = ["a cat", "a dog, told at such a length that it takes more than thirty-two"]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = z_image_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def noise(count: int = 1) -> Tensor:
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def test_prompts_are_padded_to_one_length_and_masked(pipeline: Any) -> None:
    family = family_of(pipeline)
    rows = family.encode_prompts(pipeline, PROMPTS, LENGTH)
    expected, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    assert rows["prompt_embeds"].shape == (2, LENGTH, 16)
    assert rows["prompt_embeds_mask"].sum(dim=1).tolist() == [len(each) for each in expected]
    for ours, theirs in zip(family.pipeline_inputs(rows)["prompt_embeds"], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    lengths = [len(each) for each in expected]
    assert lengths[0] < 32 < lengths[1]  # two multiples of what the denoiser pads to


def test_prompts_of_two_lengths_in_one_batch_are_those_alone(pipeline: Any) -> None:
    family, levels = family_of(pipeline), torch.tensor([0.8, 0.3])
    rows = family.encode_prompts(pipeline, PROMPTS, LENGTH)
    with torch.no_grad():
        both = family.predict(pipeline.transformer, noise(2), levels, rows, 1.0)
        for index in range(2):
            row = {key: value[index : index + 1] for key, value in rows.items()}
            alone = family.predict(
                pipeline.transformer, noise(2)[index : index + 1], levels[index : index + 1], row, 1.0
            )
            torch.testing.assert_close(both[index : index + 1], alone, rtol=1e-5, atol=1e-5)


def test_latents_decode_as_the_stock_pipeline_decodes(pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    vae = pipeline.vae
    latents = family_of(pipeline).encode_pictures(pipeline, pixels)
    expected = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents / vae.config.scaling_factor + vae.config.shift_factor, expected)


@pytest.mark.parametrize("sigma", [1.0, 0.4])
def test_one_guided_euler_step_of_predict_is_the_stock_pipelines(pipeline: Any, sigma: float) -> None:
    """Whose guidance counts from 0: `v + g (v - v')`."""
    family, latents = family_of(pipeline), noise()
    stock = pipeline(
        "a cat",
        negative_prompt="a dog, told",
        guidance_scale=3.0,
        height=32,
        width=32,
        num_inference_steps=1,
        sigmas=[sigma],
        latents=latents,
        max_sequence_length=LENGTH,
        output_type="latent",
    ).images
    level = pipeline.scheduler.sigmas[:1]
    with torch.no_grad():
        towards, away = (
            family.predict(pipeline.transformer, latents, level, rows, 1.0)
            for rows in (
                family.encode_prompts(pipeline, ["a cat"], LENGTH),
                family.encode_negative(pipeline, "a dog, told", LENGTH),
            )
        )
    torch.testing.assert_close(stock, latents - level * (towards + 3.0 * (towards - away)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(towards, away)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_generate_is_the_stock_pipeline(pipeline: Any, scale: float) -> None:
    expected = pipeline(
        "a cat",
        negative_prompt="a dog",
        guidance_scale=scale,
        height=32,
        width=32,
        num_inference_steps=3,
        max_sequence_length=LENGTH,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    settings = {**SETTINGS, "guidance_scale": scale, "negative_prompt": "a dog"}
    (ours,) = family_of(pipeline).generate(pipeline, ["a cat"], seeds=[5], **settings)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_a_picture_does_not_depend_on_its_batch(pipeline: Any) -> None:
    family, prompts = family_of(pipeline), [*PROMPTS, "a cat"]
    many = family.generate(pipeline, prompts, seeds=[5, 6, 7], **SETTINGS)
    (alone,) = family.generate(pipeline, prompts[1:2], seeds=[6], **SETTINGS)
    np.testing.assert_array_equal(np.asarray(many[1]), np.asarray(alone))
    together = family.generate(pipeline, prompts, seeds=[5, 6, 7], **SETTINGS, batch_size=3)
    for one, other in zip(many, together, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_levels_are_shifted_as_the_scheduler_has_it(pipeline: Any) -> None:
    steps = torch.arange(1000, 0, -1) / 1000
    process = family_of(pipeline).noise_process(pipeline)
    torch.testing.assert_close(process.levels, 6 * steps / (1 + 5 * steps))


@pytest.mark.parametrize(("bounds", "acts"), [((900.0, 1000.0), True), ((0.0, 900.0), False)])
def test_adapters_act_in_their_range_though_time_runs_the_other_way(
    pipeline: Any, bounds: tuple[float, float], acts: bool
) -> None:
    family = family_of(pipeline)
    settings = {**SETTINGS, "num_inference_steps": 1, "guidance_scale": 0.0}  # the one step is at 1000
    (base,) = family.generate(pipeline, ["a cat"], seeds=[5], **settings)
    add_adapter(pipeline.transformer, AdapterSpec(rank=2), "content")
    for parameter in trainable_parameters(pipeline.transformer, "content").values():
        parameter.data.fill_(1.0)
    try:
        with adapters_by_timestep(
            pipeline.transformer,
            {"content": 1.0},
            {"content": bounds},
            lambda timesteps: family.given_timesteps(pipeline, timesteps),
        ):
            (within,) = family.generate(pipeline, ["a cat"], seeds=[5], **settings)
    finally:
        remove_adapter(pipeline.transformer, "content")
    assert (np.asarray(within).tolist() != np.asarray(base).tolist()) == acts


def test_layers() -> None:
    layers = target_layers(z_image_transformer())
    assert len(layers) == 4 * (2 + 1 + 1)
    assert {name.partition(".")[0] for name in layers} == {"layers", "noise_refiner", "context_refiner"}
