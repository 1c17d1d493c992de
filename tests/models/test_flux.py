"""FLUX: what we hand to the denoiser and get from it is what the stock pipeline does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from qrlora.errors import QrloraError
from qrlora.models import LoadedModel, family_names, family_of, load_pipeline
from qrlora.models.flux import pack, unpack
from tests.tiny_pipelines import GENERATION, flux_pipeline, flux_transformer

SETTINGS: dict[str, Any] = {**GENERATION, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def model(tiny_flux: Path) -> LoadedModel:
    return load_pipeline(tiny_flux)


def test_packing_is_the_stock_pipelines() -> None:
    latents = torch.randn(2, 4, 6, 8)
    expected = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    torch.testing.assert_close(pack(latents), expected, rtol=0, atol=0)
    torch.testing.assert_close(unpack(expected, 6, 8), latents, rtol=0, atol=0)


def test_latents_decode_as_the_stock_pipeline_decodes(model: LoadedModel) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    vae = model.pipeline.vae
    latents = model.family.encode_pictures(model.pipeline, pixels)
    moments = vae.encode(pixels).latent_dist
    torch.testing.assert_close(latents / vae.config.scaling_factor + vae.config.shift_factor, moments.mode())
    sampled = model.family.encode_pictures(model.pipeline, pixels, torch.Generator().manual_seed(3))
    expected = moments.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(sampled / vae.config.scaling_factor + vae.config.shift_factor, expected)


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_one_euler_step_of_predict_is_the_stock_pipelines(guidance_embeds: bool) -> None:
    pipeline = flux_pipeline(guidance_embeds=guidance_embeds)
    pipeline.set_progress_bar_config(disable=True)
    family = family_of(pipeline)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    stock = pipeline(
        "a cat",
        height=32,
        width=32,
        num_inference_steps=1,
        guidance_scale=2.0,
        max_sequence_length=16,
        latents=pack(latents),
        output_type="latent",
    ).images
    with torch.no_grad():
        conditioning = family.encode_prompts(pipeline, ["a cat"], 16)
        velocity = family.predict(pipeline.transformer, latents, torch.ones(1), conditioning, 2.0)
    # one Euler step from sigma 1 to 0
    torch.testing.assert_close(unpack(stock, 4, 4), latents - velocity, rtol=1e-5, atol=1e-5)


def test_generate_is_the_stock_pipeline_with_true_guidance(model: LoadedModel, tiny_flux: Path) -> None:
    stock = FluxPipeline.from_pretrained(tiny_flux)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        "a cat",
        negative_prompt="",
        true_cfg_scale=2.0,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    (ours,) = model.family.generate(model.pipeline, ["a cat"], seeds=[5], **SETTINGS)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_a_picture_does_not_depend_on_its_batch(model: LoadedModel) -> None:
    many = model.family.generate(model.pipeline, ["a cat", "a dog", "a cat"], seeds=[5, 6, 7], **SETTINGS)
    (alone,) = model.family.generate(model.pipeline, ["a dog"], seeds=[6], **SETTINGS)
    np.testing.assert_array_equal(np.asarray(many[1]), np.asarray(alone))
    together = model.family.generate(
        model.pipeline, ["a cat", "a dog", "a cat"], seeds=[5, 6, 7], **SETTINGS, batch_size=3
    )
    for one, other in zip(many, together, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_generating_does_not_change_the_sigmas_of_training(model: LoadedModel) -> None:
    before = model.family.noise_process(model.pipeline).levels
    model.family.generate(model.pipeline, ["a cat"], seeds=[1], **SETTINGS)
    torch.testing.assert_close(model.family.noise_process(model.pipeline).levels, before, rtol=0, atol=0)
    torch.testing.assert_close(before, torch.arange(1000, 0, -1) / 1000)


def test_refusals(model: LoadedModel) -> None:
    with pytest.raises(QrloraError, match="2 prompts need 2 seeds"):
        model.family.generate(model.pipeline, ["a", "b"], seeds=[1], **SETTINGS)
    with pytest.raises(QrloraError, match=r"height=40 must be a multiple of 16"):
        model.family.generate(model.pipeline, ["a"], seeds=[1], **{**SETTINGS, "height": 40})
    with pytest.raises(QrloraError, match=r"Linear belongs to no model family .* flux \(FluxTransformer2DModel"):
        family_of(torch.nn.Linear(1, 1))


def test_family_of_denoiser_and_pipeline(model: LoadedModel) -> None:
    assert family_of(model.pipeline) is family_of(flux_transformer()) is model.family
    assert "flux" in family_names()
