"""Stable Diffusion 1: what we hand to the U-Net and get from it is what the stock pipeline does."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

from qrlora.adapter import attach_to_pipeline, target_layers
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter
from qrlora.models import LoadedModel, family_of, load_pipeline, read_blueprint
from qrlora.training import TrainConfig, train
from tests.tiny_newer import save_sd15, sd15_pipeline, sd15_unet
from tests.tiny_pipelines import SDXL_GENERATION, save

SETTINGS: dict[str, Any] = {**SDXL_GENERATION, "num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = sd15_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_guided_step_of_predict_is_the_stock_pipelines(pipeline: Any, prediction: str) -> None:
    """By DDIM, whose step is a formula (arXiv 2010.02502, equation 12, without noise)."""
    made = copy.copy(pipeline)
    made.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config,
        prediction_type=prediction,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
    family = family_of(made)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    stock = made(
        "a cat",
        negative_prompt="a dog",
        height=32,
        width=32,
        num_inference_steps=1,
        guidance_scale=3.0,
        latents=latents,
        output_type="latent",
    ).images
    process = family.noise_process(made)
    index = torch.tensor([0])  # step 999
    with torch.no_grad():
        towards, away = (
            family.predict(made.unet, latents, process.levels[index], rows, 1.0)
            for rows in (family.encode_prompts(made, ["a cat"], 77), family.encode_negative(made, "a dog", 77))
        )
    guided = away + 3.0 * (towards - away)
    ones, zeros = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    signal, spread = process.noisy(ones, zeros, index), process.noisy(zeros, ones, index)
    clean = (latents - spread * guided) / signal if prediction == "epsilon" else signal * latents - spread * guided
    torch.testing.assert_close(stock, clean, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(towards, away)


@pytest.mark.parametrize("negative", ["", "a dog"])
def test_generate_is_the_stock_pipeline(pipeline: Any, negative: str) -> None:
    expected = pipeline(
        "a cat",
        negative_prompt=negative or None,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    (ours,) = family_of(pipeline).generate(pipeline, ["a cat"], seeds=[5], **{**SETTINGS, "negative_prompt": negative})
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_latents_decode_as_the_stock_pipeline_decodes(pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = family_of(pipeline).encode_pictures(pipeline, pixels)
    expected = pipeline.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents / pipeline.vae.config.scaling_factor, expected)


def test_levels_are_those_of_the_schedulers_betas(pipeline: Any) -> None:
    process = family_of(pipeline).noise_process(pipeline)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    factors = process.noisy(torch.ones(1000, 1, 1, 1), torch.zeros(1000, 1, 1, 1), torch.arange(1000)).flatten()
    expected = torch.from_numpy(np.sqrt(np.cumprod(1 - betas))[::-1].copy())
    torch.testing.assert_close(factors.double(), expected, rtol=1e-4, atol=1e-6)


def test_attention_alone_is_adapted() -> None:
    # transformer blocks: one on each of three levels down, one in the middle, two on each of three levels up
    assert len(target_layers(sd15_unet())) == 8 * (3 + 1 + 6)


def test_sizes_are_the_models_own(pipeline: Any) -> None:
    defaults = family_of(pipeline).defaults_of(pipeline)
    assert (defaults.height, defaults.width) == (32, 32)


def with_checker(folder: Path) -> LoadedModel:
    """A folder that has a safety checker, which finds nothing: concepts without a direction are near nothing."""
    pipeline: Any = sd15_pipeline()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**small, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config=small, vision_config=vision, projection_dim=16)
    pipeline.register_modules(
        safety_checker=StableDiffusionSafetyChecker(config).eval(),
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    )
    return load_pipeline(save(pipeline, folder, "checked", SDXL_GENERATION))


def test_a_safety_checker_goes_where_the_autoencoder_goes(tmp_path: Path, pipeline: Any) -> None:
    model = with_checker(tmp_path)
    (checked,) = model.family.generate(model.pipeline, ["a cat"], seeds=[5], **SETTINGS)
    (plain,) = model.family.generate(pipeline, ["a cat"], seeds=[5], **SETTINGS)
    np.testing.assert_array_equal(np.asarray(checked), np.asarray(plain))
    model.release_encoders()
    assert model.pipeline.safety_checker is model.pipeline.vae is model.pipeline.text_encoder is None
    model.restore_encoders()
    assert model.pipeline.safety_checker is not None


def test_a_safety_checker_is_known_without_its_weights(tmp_path: Path) -> None:
    """It is a class of the pipeline's own; `qrlora estimate` counts it with what pictures need."""
    model = with_checker(tmp_path)
    checker = read_blueprint(tmp_path).build("safety_checker")
    assert isinstance(checker, StableDiffusionSafetyChecker)
    assert all(each.is_meta for each in checker.parameters())
    shapes = {name: each.shape for name, each in model.pipeline.safety_checker.named_parameters()}
    assert {name: each.shape for name, each in checker.named_parameters()} == shapes


def test_its_text_encoder_is_trained_with_it(tmp_path: Path) -> None:
    folder = save_sd15(tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    values = {
        "model": str(folder),
        "instance_data_dir": str(tmp_path / "a.png"),
        "instance_prompt": "a <c> dog",
        "output_dir": str(tmp_path / "out"),
        "max_train_steps": 2,
        "learning_rate": 0.1,
        "train_text_encoder": True,
    }
    path = train(TrainConfig.parse(values), progress=False).path
    adapter = read_adapter(path)
    assert set(adapter.companions) == {"text_encoder"}
    ours = load_pipeline(folder)
    attach_to_pipeline(ours.pipeline, adapter, "content")
    (picture,) = ours.family.generate(ours.pipeline, ["a <c> dog"], seeds=[5], **SETTINGS)
    stock = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="content")
    generator = torch.Generator().manual_seed(5)
    sizes = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0}
    expected = stock("a <c> dog", generator=generator, **sizes).images[0]
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).max() <= 1


def test_refusals(pipeline: Any) -> None:
    family = family_of(pipeline)
    assert family_of(pipeline.unet) is family
    inpainting = sd15_unet()
    inpainting.register_to_config(in_channels=9)
    with pytest.raises(QrloraError, match="UNet2DConditionModel belongs to no model family"):
        family_of(inpainting)
    with pytest.raises(QrloraError, match="max_sequence_length=128 is not possible for sd15: it is always 77"):
        family.generate(pipeline, ["a"], seeds=[1], **{**SETTINGS, "max_sequence_length": 128})
    without = copy.copy(pipeline)
    without.text_encoder = None
    with pytest.raises(QrloraError, match="the pipeline has no text_encoder"):
        family.encode_prompts(without, ["a"], 77)
