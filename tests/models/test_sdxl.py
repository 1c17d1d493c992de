"""Stable Diffusion XL: what we hand to the denoiser and get from it is what the stock pipeline does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from torch import Tensor

from qrlora.adapter import AdapterSpec, add_adapter, target_layers
from qrlora.errors import QrloraError
from qrlora.models import LoadedModel, family_of, load_pipeline
from tests.tiny_models import tiny_unet
from tests.tiny_pipelines import SDXL_GENERATION, clip_tokenizer, sdxl_pipeline, sdxl_scheduler, sdxl_unet

SETTINGS: dict[str, Any] = {**SDXL_GENERATION, "num_inference_steps": 3, "guidance_scale": 3.0}
KINDS: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "v": {"prediction": "v_prediction"},
    "v-zero-snr": {"prediction": "v_prediction", "zero_snr": True},
}


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> LoadedModel:
    return load_pipeline(tiny_sdxl)


def places(*rows: tuple[int, int, int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    original, corner, target = torch.tensor(rows).split(2, dim=1)
    return original, corner, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_latents_are_encoded_in_fp32_whatever_the_autoencoders_dtype(dtype: torch.dtype) -> None:
    """As diffusers' scripts do: the autoencoder's configuration says force_upcast."""
    pipeline = sdxl_pipeline()
    vae = pipeline.vae.to(dtype)
    assert vae.config.force_upcast
    assert vae.config.shift_factor is None
    rounded = sdxl_pipeline().vae
    rounded.load_state_dict({key: value.float() for key, value in vae.state_dict().items()})
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = rounded.encode(pixels).latent_dist.mode() * 0.13025
    torch.testing.assert_close(family_of(pipeline).encode_pictures(pipeline, pixels), expected)
    assert vae.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_one_guided_euler_step_of_predict_is_the_stock_pipelines(kind: str) -> None:
    pipeline = sdxl_pipeline(**KINDS[kind])
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
        latents=latents,
        original_size=(40, 36),
        crops_coords_top_left=(3, 2),
        negative_original_size=(40, 36),
        negative_crops_coords_top_left=(3, 2),
        negative_target_size=(32, 32),
        output_type="latent",
    ).images
    step = int(pipeline.scheduler.timesteps[0])
    process = family.noise_process(pipeline)
    index = (process.levels == step).nonzero().flatten()
    # Euler's own table: it keeps the last alpha of a schedule that ends in pure noise just above 0
    alpha = pipeline.scheduler.alphas_cumprod[step]
    started = latents * pipeline.scheduler.init_noise_sigma
    noisy = started * alpha.sqrt()
    told = family.picture_conditioning(*places((40, 36, 3, 2, 32, 32)))
    with torch.no_grad():
        towards, against = (
            family.predict(pipeline.unet, noisy, process.levels[index], {**rows, **told}, 1.0)
            for rows in (
                family.encode_prompts(pipeline, ["a cat"], 77),
                family.encode_negative(pipeline, "a dog", 77),
            )
        )
    guided = against + 3.0 * (towards - against)
    if kind == "epsilon":
        expected = started - ((1 - alpha) / alpha).sqrt() * guided
    else:
        expected = alpha.sqrt() * noisy - (1 - alpha).sqrt() * guided
    # Euler steps from noise 4096 times as large as the picture there, so its fp32 keeps three digits
    torch.testing.assert_close(stock, expected, rtol=1e-4, atol=1e-3 if kind == "v-zero-snr" else 1e-4)
    assert not torch.allclose(towards, against)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("negative", ["", "a dog"])
def test_generate_is_the_stock_pipeline(kind: str, negative: str) -> None:
    """Without a negative prompt the stock pipeline guides away from zeros, not from an empty prompt."""
    pipeline, stock = sdxl_pipeline(**KINDS[kind]), sdxl_pipeline(**KINDS[kind])
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        "a cat",
        negative_prompt=negative or None,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    settings = {**SETTINGS, "negative_prompt": negative}
    (ours,) = family_of(pipeline).generate(pipeline, ["a cat"], seeds=[5], **settings)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_an_empty_negative_prompt_is_encoded_where_the_model_wants_it(model: LoadedModel) -> None:
    zeros = model.family.encode_negative(model.pipeline, "", 77)
    assert not any(rows.any() for rows in zeros.values())
    pipeline = sdxl_pipeline()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    expected = model.family.encode_prompts(pipeline, [""], 77)
    torch.testing.assert_close(model.family.encode_negative(pipeline, "", 77), expected, rtol=0, atol=0)


def test_a_picture_does_not_depend_on_its_batch(model: LoadedModel) -> None:
    prompts = ["a cat", "a dog", "a cat"]
    many = model.family.generate(model.pipeline, prompts, seeds=[5, 6, 7], **SETTINGS)
    (alone,) = model.family.generate(model.pipeline, ["a dog"], seeds=[6], **SETTINGS)
    np.testing.assert_array_equal(np.asarray(many[1]), np.asarray(alone))
    together = model.family.generate(model.pipeline, prompts, seeds=[5, 6, 7], **SETTINGS, batch_size=3)
    for one, other in zip(many, together, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_sizes_reach_the_u_net_in_full_precision() -> None:
    """1365 is no number of bfloat16."""
    ids = family_of(sdxl_unet()).picture_conditioning(*places((1365, 2048, 0, 341, 1024, 1024)))["time_ids"]
    assert ids.tolist() == [[1365, 2048, 0, 341, 1024, 1024]]
    seen: list[Tensor] = []
    unet = sdxl_unet().bfloat16()
    unet.add_time_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    pipeline = sdxl_pipeline().to(torch.bfloat16)
    rows = family_of(unet).encode_prompts(pipeline, ["a cat"], 77)
    with torch.no_grad():
        family_of(unet).predict(unet, torch.zeros(1, 4, 4, 4), torch.tensor([500.0]), {**rows, "time_ids": ids}, 1.0)
    assert seen[0].tolist() == [1365, 2048, 0, 341, 1024, 1024]


@pytest.mark.parametrize("zero_snr", [False, True])
def test_levels_are_those_of_the_schedulers_betas(zero_snr: bool) -> None:
    pipeline = sdxl_pipeline(prediction="v_prediction", zero_snr=zero_snr)
    process = family_of(pipeline).noise_process(pipeline)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    if zero_snr:  # arXiv 2305.08891, algorithm 1
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    clean, noise = torch.ones(1000, 1, 1, 1), torch.zeros(1000, 1, 1, 1)
    factors = process.noisy(clean, noise, torch.arange(1000)).flatten().flip(0)
    torch.testing.assert_close(factors.double(), torch.from_numpy(root.copy()), rtol=1e-4, atol=1e-6)
    assert process.levels.tolist() == list(range(999, -1, -1))
    assert (factors[-1] == 0) == zero_snr


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_is_finite_where_a_schedule_ends_in_pure_noise(prediction: str) -> None:
    pipeline = sdxl_pipeline(prediction=prediction, zero_snr=True)
    weights = family_of(pipeline).noise_process(pipeline).min_snr_weights(torch.tensor([0, 1, 999]), 5.0)
    assert torch.isfinite(weights).all()
    # pure noise: nothing of v, whose target is the picture there; all of the noise
    assert float(weights[0]) == (0.0 if prediction == "v_prediction" else 1.0)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler works on sigmas"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler works on sigmas"),
        (DDPMScheduler(prediction_type="sample"), "predicts 'sample' by the configuration of its DDPMScheduler"),
    ],
    ids=["edm", "flow", "sample"],
)
def test_other_objectives_are_refused(scheduler: Any, words: str) -> None:
    pipeline = sdxl_pipeline()
    pipeline.scheduler = scheduler
    with pytest.raises(QrloraError, match=words):
        family_of(pipeline).noise_process(pipeline)


def test_models_distilled_on_guidance_are_refused() -> None:
    pipeline = sdxl_pipeline()
    pipeline.unet.register_to_config(time_cond_proj_dim=16)
    with pytest.raises(QrloraError, match="latent consistency model"):
        family_of(pipeline).noise_process(pipeline)


def test_attention_alone_is_adapted() -> None:
    layers = target_layers(sdxl_unet())
    # transformer blocks: 2 x 2 down, 1 in the middle, 2 x 3 up, with eight layers each
    assert len(layers) == 8 * (4 + 1 + 6)
    assert {name.rpartition("transformer_blocks.")[2].partition(".")[2] for name in layers} == {
        f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
    }


def test_b_loras_blocks() -> None:
    unet = sdxl_unet()
    content, style, both = (target_layers(unet, "auto", f"b-lora{end}") for end in ("-content", "-style", ""))
    assert {name[:26] for name in content} == {"up_blocks.0.attentions.0.t"}
    assert {name[:26] for name in style} == {"up_blocks.0.attentions.1.t"}
    assert sorted([*content, *style]) == sorted(both)
    assert len(content) == len(style) == 8


def test_refusals(model: LoadedModel) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(QrloraError, match=words):
            model.family.generate(model.pipeline, ["a"], seeds=[1], **{**SETTINGS, **changes})

    refused("height=36 must be a multiple of 8 for this model; 32 is", height=36)
    refused("true_cfg_scale=2.0 has no meaning for sdxl, whose .* is guidance_scale; leave it at 1", true_cfg_scale=2.0)
    refused("max_sequence_length=128 is not possible for sdxl: it is always 77", max_sequence_length=128)


def test_other_pipelines_are_refused_and_other_u_nets_another_family() -> None:
    stock: Any = sdxl_pipeline()
    assert family_of(stock) is family_of(stock.unet)
    with pytest.raises(QrloraError, match=r"StableDiffusionXLImg2ImgPipeline belongs to no model family known here"):
        family_of(StableDiffusionXLImg2ImgPipeline(**stock.components, add_watermarker=False))
    first = StableDiffusionPipeline(
        stock.vae,
        stock.text_encoder,
        clip_tokenizer(),
        tiny_unet(),
        sdxl_scheduler(),
        None,
        None,
        requires_safety_checker=False,
    )
    # the same class of U-Net, which is told no sizes: another family
    assert family_of(first) is family_of(tiny_unet())
    assert (family_of(first).name, family_of(stock).name) == ("sd15", "sdxl")
    # what "auto" means is a matter of the denoiser's class, so adapters alone work on it
    assert all(".attn" in name for name in add_adapter(tiny_unet(), AdapterSpec(rank=2), "content"))
