"""FLUX.2: what we hand to the denoiser and get from it is what the stock pipelines do."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from torch import Tensor

from qrlora.adapter import target_layers
from qrlora.errors import QrloraError
from qrlora.models import family_of
from qrlora.models.flux2 import patch
from tests.tiny_newer import LENGTH, NEWER_GENERATION, flux2_klein_pipeline, flux2_pipeline, flux2_transformer

SETTINGS: dict[str, Any] = {**NEWER_GENERATION, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def dev() -> Any:
    return quiet(flux2_pipeline())


@pytest.fixture(scope="module")
def klein() -> Any:
    return quiet(flux2_klein_pipeline())


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock(pipeline: Any, prompt: str, **more: Any) -> Any:
    arguments = {name: SETTINGS[name] for name in family_of(pipeline).generation_arguments}
    return pipeline(prompt=prompt, **{**arguments, **more}).images


def test_patches_are_the_stock_pipelines() -> None:
    latents = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(patch(latents), Flux2Pipeline._patchify_latents(latents), rtol=0, atol=0)


def test_latents_are_those_of_a_reference_picture(dev: Any) -> None:
    """Which the stock pipeline encodes, normalises and hands to the denoiser itself."""
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    ours = family_of(dev).encode_pictures(dev, pixels)
    expected = dev._encode_vae_image(pixels, torch.Generator())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert ours.shape == (1, 16, 2, 2)
    # and back by what decodes
    mean, variance = dev.vae.bn.running_mean, dev.vae.bn.running_var
    raw = ours * (variance + 1e-4).sqrt()[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(Flux2Pipeline._unpatchify_latents(raw), dev.vae.encode(pixels).latent_dist.mode())
    sampled = family_of(dev).encode_pictures(dev, pixels, torch.Generator().manual_seed(3))
    assert not torch.allclose(sampled, ours)


def one_step(pipeline: Any, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, what the stock pipeline makes of it in one step, and the step's true level."""
    latents = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    made = stock(
        pipeline,
        "a cat",
        latents=latents,
        num_inference_steps=1,
        sigmas=[sigma],
        guidance_scale=3.0,
        output_type="latent",
    )
    return latents, made, pipeline.scheduler.sigmas[:1]


@pytest.mark.parametrize("sigma", [1.0, 0.4])
def test_one_euler_step_of_predict_is_devs(dev: Any, sigma: float) -> None:
    family = family_of(dev)
    latents, made, level = one_step(dev, sigma)
    with torch.no_grad():
        velocity = family.predict(dev.transformer, latents, level, family.encode_prompts(dev, ["a cat"], LENGTH), 3.0)
    expected = latents - level * velocity
    torch.testing.assert_close(made.transpose(1, 2).reshape(1, 16, 2, 2), expected, rtol=1e-5, atol=1e-5)
    assert family.has_guidance_embedding(dev.transformer)


@pytest.mark.parametrize("sigma", [1.0, 0.4])
def test_one_guided_euler_step_of_predict_is_kleins(klein: Any, sigma: float) -> None:
    family = family_of(klein)
    latents, made, level = one_step(klein, sigma)
    with torch.no_grad():
        towards, away = (
            family.predict(klein.transformer, latents, level, rows, 1.0)
            for rows in (family.encode_prompts(klein, ["a cat"], LENGTH), family.encode_negative(klein, "", LENGTH))
        )
    expected = latents - level * (away + 3.0 * (towards - away))
    mean, variance = klein.vae.bn.running_mean, klein.vae.bn.running_var
    raw = expected * (variance + 1e-4).sqrt()[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(made, Flux2Pipeline._unpatchify_latents(raw), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(towards, away)


@pytest.mark.parametrize("kind", ["dev", "klein", "distilled"])
def test_generate_is_the_stock_pipeline(kind: str, dev: Any, klein: Any) -> None:
    pipeline = (
        quiet(flux2_klein_pipeline(distilled=True)) if kind == "distilled" else {"dev": dev, "klein": klein}[kind]
    )
    scale = 1.0 if kind == "distilled" else 2.0
    (expected,) = stock(pipeline, "a cat", guidance_scale=scale, generator=torch.Generator().manual_seed(5))
    settings = {**SETTINGS, "guidance_scale": scale}
    (ours,) = family_of(pipeline).generate(pipeline, ["a cat"], seeds=[5], **settings)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_klein_guides_away_from_any_prompt(klein: Any) -> None:
    family = family_of(klein)
    (empty,) = family.generate(klein, ["a cat"], seeds=[5], **SETTINGS)
    (named,) = family.generate(klein, ["a cat"], seeds=[5], **{**SETTINGS, "negative_prompt": "a dog"})
    assert np.asarray(named).tolist() != np.asarray(empty).tolist()


def test_a_picture_does_not_depend_on_its_batch(klein: Any) -> None:
    family, prompts = family_of(klein), ["a cat", "a dog, at length", "a cat"]
    many = family.generate(klein, prompts, seeds=[5, 6, 7], **SETTINGS)
    (alone,) = family.generate(klein, prompts[1:2], seeds=[6], **SETTINGS)
    np.testing.assert_array_equal(np.asarray(many[1]), np.asarray(alone))
    together = family.generate(klein, prompts, seeds=[5, 6, 7], **SETTINGS, batch_size=3)
    for one, other in zip(many, together, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_levels_are_not_shifted_for_training(dev: Any) -> None:
    """The pipeline shifts them by the number of tokens, which training does not."""
    family = family_of(dev)
    family.generate(dev, ["a cat"], seeds=[1], **SETTINGS)
    torch.testing.assert_close(family.noise_process(dev).levels, torch.arange(1000, 0, -1) / 1000)
    assert family.given_timesteps(dev, torch.tensor([400.0])).tolist() == pytest.approx([0.4])


def test_dev_and_klein_are_told_apart(dev: Any, klein: Any) -> None:
    assert family_of(dev) is family_of(dev.transformer)
    assert family_of(klein) is family_of(klein.transformer)
    assert (family_of(dev).name, family_of(klein).name) == ("flux2", "flux2-klein")
    defaults = family_of(klein).defaults_of(klein)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (50, 4.0)
    distilled = family_of(klein).defaults_of(flux2_klein_pipeline(distilled=True))
    assert (distilled.num_inference_steps, distilled.guidance_scale) == (4, 1.0)


def test_layers() -> None:
    layers = target_layers(flux2_transformer())
    # a double block's eight projections and both halves of two feed-forwards; a single block's fused one
    assert len(layers) == 8 + 4 + 1
    assert "single_transformer_blocks.0.attn.to_qkv_mlp_proj" in layers


def test_refusals(dev: Any) -> None:
    distilled = flux2_klein_pipeline(distilled=True)
    family = family_of(distilled)
    with pytest.raises(QrloraError, match=r"guidance_scale=2\.0 has no effect on this model, which was distilled"):
        family.generate(distilled, ["a cat"], seeds=[1], **SETTINGS)
    with pytest.raises(QrloraError, match="height=40 must be a multiple of 16"):
        family.generate(distilled, ["a"], seeds=[1], **{**SETTINGS, "guidance_scale": 1.0, "height": 40})
    with pytest.raises(QrloraError, match=r"true_cfg_scale=2\.0 has no meaning for flux2"):
        family_of(dev).generate(dev, ["a"], seeds=[1], **{**SETTINGS, "true_cfg_scale": 2.0})
