"""Stable Diffusion 3 and 3.5: what we hand to the denoiser and get from it is what the stock pipeline does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline

from qrlora.adapter import target_layers
from qrlora.errors import QrloraError
from qrlora.models import LoadedModel, family_of, load_pipeline
from tests.tiny_pipelines import SD3_GENERATION, save_sd3, sd3_pipeline, sd3_transformer

SETTINGS: dict[str, Any] = {**SD3_GENERATION, "num_inference_steps": 3, "guidance_scale": 3.0}
KINDS = {"sd3": {}, "sd3.5": {"dual_attention": True}, "without-t5": {"t5": False}}


@pytest.fixture(scope="module")
def model(tiny_sd3: Path) -> LoadedModel:
    return load_pipeline(tiny_sd3)


def test_latents_decode_as_the_stock_pipeline_decodes(model: LoadedModel) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    vae = model.pipeline.vae
    latents = model.family.encode_pictures(model.pipeline, pixels)
    assert latents.shape == (2, 4, 4, 4)
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents / vae.config.scaling_factor + vae.config.shift_factor, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_guided_euler_step_of_predict_is_the_stock_pipelines(kind: str) -> None:
    pipeline = sd3_pipeline(**KINDS[kind])
    pipeline.set_progress_bar_config(disable=True)
    family = family_of(pipeline)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    stock = pipeline(
        "a cat",
        negative_prompt="a dog",
        height=32,
        width=32,
        num_inference_steps=1,
        guidance_scale=3.0,
        max_sequence_length=16,
        latents=latents,
        output_type="latent",
    ).images
    with torch.no_grad():
        towards, against = (
            family.predict(pipeline.transformer, latents, torch.ones(1), rows, 1.0)
            for rows in (
                family.encode_prompts(pipeline, ["a cat"], 16),
                family.encode_negative(pipeline, "a dog", 16),
            )
        )
    # one Euler step from sigma 1 to 0
    expected = latents - (against + 3.0 * (towards - against))
    torch.testing.assert_close(stock, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(towards, against)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative", ["", "a dog"])
def test_generate_is_the_stock_pipeline(kind: str, negative: str) -> None:
    pipeline = sd3_pipeline(**KINDS[kind])
    stock = sd3_pipeline(**KINDS[kind])
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        "a cat",
        negative_prompt=negative or None,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=3.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    settings = {**SETTINGS, "negative_prompt": negative}
    (ours,) = family_of(pipeline).generate(pipeline, ["a cat"], seeds=[5], **settings)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_a_picture_does_not_depend_on_its_batch(model: LoadedModel) -> None:
    prompts = ["a cat", "a dog", "a cat"]
    many = model.family.generate(model.pipeline, prompts, seeds=[5, 6, 7], **SETTINGS)
    (alone,) = model.family.generate(model.pipeline, ["a dog"], seeds=[6], **SETTINGS)
    np.testing.assert_array_equal(np.asarray(many[1]), np.asarray(alone))
    together = model.family.generate(model.pipeline, prompts, seeds=[5, 6, 7], **SETTINGS, batch_size=3)
    for one, other in zip(many, together, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_levels_have_the_schedulers_shift_also_after_generating(model: LoadedModel) -> None:
    plain = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    model.family.generate(model.pipeline, ["a cat"], seeds=[1], **SETTINGS)
    levels = model.family.noise_process(model.pipeline).levels
    torch.testing.assert_close(levels.double(), 3 * plain / (1 + 2 * plain), rtol=1e-6, atol=0)


def test_the_second_attention_is_left_alone() -> None:
    layers = target_layers(sd3_transformer(dual_attention=True))
    assert layers == target_layers(sd3_transformer())
    # eight a block, but for the last, which gives no text out
    assert len(layers) == 3 * 8 - 1
    assert not any("attn2" in name for name in layers)


def test_defaults_are_those_of_the_model_cards() -> None:
    family = family_of(sd3_transformer())
    told = {}
    for name, (norm, dual) in {
        "3": (None, ()),
        "3.5-medium": ("rms_norm", (0,)),
        "3.5-large": ("rms_norm", ()),
    }.items():
        pipeline = sd3_pipeline()
        pipeline.transformer.register_to_config(qk_norm=norm, dual_attention_layers=dual)
        defaults = family.defaults_of(pipeline)
        told[name] = (defaults.num_inference_steps, defaults.guidance_scale, defaults.max_sequence_length)
    assert told == {"3": (28, 7.0, 256), "3.5-medium": (40, 4.5, 256), "3.5-large": (28, 3.5, 256)}


def test_a_folder_without_t5_loads_trains_its_encoders_away_and_gets_them_back(tmp_path: Path) -> None:
    model = load_pipeline(save_sd3(tmp_path / "small", t5=False))
    assert model.pipeline.text_encoder_3 is None
    before = model.family.encode_prompts(model.pipeline, ["a cat"], 16)
    assert before["prompt_embeds"].shape == (1, 77 + 16, 64)
    assert not before["prompt_embeds"][:, 77:].any()
    model.release_encoders()
    with pytest.raises(QrloraError, match="the pipeline has no text_encoder and text_encoder_2; they were freed"):
        model.family.encode_prompts(model.pipeline, ["a cat"], 16)
    model.restore_encoders()
    assert model.pipeline.text_encoder_3 is None
    after = model.family.encode_prompts(model.pipeline, ["a cat"], 16)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_refusals(model: LoadedModel) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(QrloraError, match=words):
            model.family.generate(model.pipeline, ["a"], seeds=[1], **{**SETTINGS, **changes})

    refused("height=40 must be a multiple of 16 for this model; 32 is", height=40)
    refused("width=112 is above 96, the most that this model has positions for", width=112)
    refused("true_cfg_scale=2.0 has no meaning for sd3, whose .* is guidance_scale; leave it at 1", true_cfg_scale=2.0)
    refused("max_sequence_length=600 is not possible for sd3: it is 1 to 512", max_sequence_length=600)
    with pytest.raises(QrloraError, match="height=112 is above 96"):
        model.family.encode_pictures(model.pipeline, torch.zeros(1, 3, 112, 32))


def test_another_pipeline_around_the_same_denoiser_is_refused() -> None:
    stock: Any = sd3_pipeline()
    other = StableDiffusion3Img2ImgPipeline(**{**stock.components, "image_encoder": None, "feature_extractor": None})
    with pytest.raises(QrloraError, match=r"StableDiffusion3Img2ImgPipeline belongs to no .* in StableDiffusion3Pipe"):
        family_of(other)
    assert family_of(stock) is family_of(stock.transformer)
    assert isinstance(stock, StableDiffusion3Pipeline)
