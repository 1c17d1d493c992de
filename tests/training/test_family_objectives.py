"""The loss of each family against its formula, written out in float64 around the stock denoiser."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline, FluxPipeline
from PIL import Image
from torch import Tensor

from qrlora.data import encode_examples, load_examples
from qrlora.models import family_of
from qrlora.training import TrainConfig
from qrlora.training.objective import draw, level_weights, loss_of
from tests.tiny_newer import flux2_klein_pipeline, flux2_pipeline, qwen_image_pipeline, sd15_pipeline, z_image_pipeline
from tests.tiny_pipelines import flux_pipeline, sd3_pipeline, sdxl_pipeline

GUIDANCE, GAMMA = 2.5, 5.0
CAPTIONS = {"a": "a photo of a", "b": "a picture of b, but at some length"}
KINDS: dict[str, Callable[[], Any]] = {
    "flux-dev": lambda: flux_pipeline(guidance_embeds=True),
    "flux-schnell": flux_pipeline,
    "sd3": sd3_pipeline,
    "sd3.5-medium": lambda: sd3_pipeline(dual_attention=True),
    "sd3-without-t5": lambda: sd3_pipeline(t5=False),
    "sdxl": sdxl_pipeline,
    "sdxl-v": lambda: sdxl_pipeline(prediction="v_prediction"),
    "sdxl-v-zero-snr": lambda: sdxl_pipeline(prediction="v_prediction", zero_snr=True),
    "sd15": sd15_pipeline,
    "flux2-dev": flux2_pipeline,
    "flux2-klein": flux2_klein_pipeline,
    "qwen-image": qwen_image_pipeline,
    "z-image": z_image_pipeline,
}
SHIFTS = {"sd3": 3, "z-image": 6}
TOKENS = {"sdxl": 77, "sd15": 77, "flux": 16, "sd3": 16}


def flux_prediction(pipeline: Any, noisy: Tensor, sigma: Tensor, rows: list[Any]) -> Tensor:
    transformer = pipeline.transformer
    embeds, pooled, _ = pipeline.encode_prompt(rows, None, max_sequence_length=16)
    tokens = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, len(noisy), 4, 4, 4),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=FluxPipeline._prepare_latent_image_ids(len(noisy), 2, 2, noisy.device, noisy.dtype),
        txt_ids=torch.zeros(16, 3, dtype=noisy.dtype),
        guidance=torch.full_like(sigma, GUIDANCE) if transformer.config.guidance_embeds else None,
    ).sample
    return FluxPipeline._unpack_latents(tokens, 32, 32, 8)


def sd3_prediction(pipeline: Any, noisy: Tensor, sigma: Tensor, rows: list[Any]) -> Tensor:
    embeds, _, pooled, _ = pipeline.encode_prompt(rows, None, None, max_sequence_length=16)
    return pipeline.transformer(noisy, embeds, pooled, 1000 * sigma).sample


def flux2_prediction(pipeline: Any, noisy: Tensor, sigma: Tensor, rows: list[Any]) -> Tensor:
    transformer = pipeline.transformer
    embeds, text_ids = pipeline.encode_prompt(rows, max_sequence_length=64)
    ids = pipeline._prepare_latent_ids(noisy)
    tokens = transformer(
        hidden_states=pipeline._pack_latents(noisy),
        encoder_hidden_states=embeds,
        timestep=sigma,
        img_ids=ids,
        txt_ids=text_ids,
        guidance=torch.full_like(sigma, GUIDANCE) if transformer.config.guidance_embeds else None,
    ).sample
    return pipeline._unpack_latents_with_ids(tokens, ids)


def qwen_image_prediction(pipeline: Any, noisy: Tensor, sigma: Tensor, rows: list[Any]) -> Tensor:
    embeds, mask = pipeline.encode_prompt(rows, max_sequence_length=64)
    tokens = pipeline.transformer(
        hidden_states=pipeline._pack_latents(noisy, len(noisy), 4, 4, 4),
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,
        timestep=sigma,
        img_shapes=[[(1, 2, 2)]] * len(noisy),
    ).sample
    return pipeline._unpack_latents(tokens, 32, 32, 8)[:, :, 0]


def z_image_prediction(pipeline: Any, noisy: Tensor, sigma: Tensor, rows: list[Any]) -> Tensor:
    """Time runs from noise to clean, and so does the direction that comes out."""
    texts, _ = pipeline.encode_prompt(rows, do_classifier_free_guidance=False, max_sequence_length=64)
    pictures = pipeline.transformer([each[:, None] for each in noisy], 1 - sigma, texts).sample
    return -torch.cat([each[None, :, 0] for each in pictures])


PREDICTIONS: dict[str, Callable[..., Tensor]] = {
    "flux": flux_prediction,
    "sd3": sd3_prediction,
    "flux2": flux2_prediction,
    "flux2-klein": flux2_prediction,
    "qwen-image": qwen_image_prediction,
    "z-image": z_image_prediction,
}


def flow_loss(name: str, pipeline: Any, clean: Tensor, noise: Tensor, index: Tensor, rows: list[Any]) -> Tensor:
    """arXiv 2403.03206, equation 13 with uniform weights: x_s = (1 - s) x_0 + s e, v = e - x_0."""
    sigma = (1000 - index.double()) / 1000
    shift = SHIFTS.get(name, 1)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    s = sigma[:, None, None, None]
    predicted = PREDICTIONS[name](pipeline, (1 - s) * clean + s * noise, sigma, rows)
    return (predicted - (noise - clean)).square().mean()


def latents_of(name: str, pipeline: Any, pixels: Tensor) -> Tensor:
    """As the denoiser wants them."""
    vae, config = pipeline.vae, pipeline.vae.config
    if name == "qwen-image":  # videos of one frame; mean and deviation by channel
        latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)
        mean, deviation = (torch.tensor(config[f"latents_{each}"])[:, None, None] for each in ("mean", "std"))
        return (latents - mean) / deviation
    latents = vae.encode(pixels).latent_dist.mode()
    if name.startswith("flux2"):  # a batch norm without a weight, on patches
        norm = torch.nn.functional.batch_norm
        patches = Flux2Pipeline._patchify_latents(latents)
        return norm(patches, vae.bn.running_mean, vae.bn.running_var, eps=config.batch_norm_eps)
    return (latents - (config.shift_factor or 0)) * config.scaling_factor


def unet_loss(
    pipeline: Any, clean: Tensor, noise: Tensor, index: Tensor, rows: list[Any], time_ids: Tensor | None
) -> Tensor:
    """arXiv 2006.11239, equation 12; v by arXiv 2202.00512; Min-SNR by arXiv 2303.09556."""
    config = pipeline.scheduler.config
    v = config.prediction_type == "v_prediction"
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    if config.get("rescale_betas_zero_snr"):
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    step = 999 - index
    signal, spread = (part[step][:, None, None, None] for part in (root, (1 - root**2).sqrt()))
    if time_ids is None:
        embeds, told = pipeline.encode_prompt(rows, "cpu", 1, False)[0], None
    else:
        embeds, _, pooled, _ = pipeline.encode_prompt(rows, do_classifier_free_guidance=False)
        told = {"text_embeds": pooled, "time_ids": time_ids}
    predicted = pipeline.unet(signal * clean + spread * noise, step, embeds, added_cond_kwargs=told).sample
    error = (predicted - (signal * noise - spread * clean if v else noise)).square().mean(dim=(1, 2, 3))
    snr = (signal / spread).square().flatten()
    return (error * snr.clamp(max=GAMMA) / (snr + 1 if v else snr)).mean()


def in_double(pipeline: Any) -> Any:
    parts = {name: part for name, part in pipeline.components.items() if not isinstance(part, torch.nn.Module)}
    modules = {
        name: copy.deepcopy(part).double()
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    return type(pipeline)(**parts, **modules)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """41 and 50 columns: cut to squares of 36 and 36, with 2 and 7 columns to the left, 3 and 7 to the right."""
    generator = np.random.default_rng(0)
    for name, width in (("a", 41), ("b", 50)):
        Image.fromarray(generator.integers(0, 256, (36, width, 3), np.uint8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(CAPTIONS[name])
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_its_formula(kind: str, pictures: Path) -> None:
    pipeline = KINDS[kind]()
    family, unet = family_of(pipeline), kind.startswith(("sdxl", "sd15"))
    examples = load_examples(pictures, None, 32)
    encoded = encode_examples(
        examples, family, pipeline, max_sequence_length=TOKENS.get(family.name, 64), random_flip=True
    )
    config = TrainConfig.parse(
        {
            "instance_data_dir": str(pictures),
            "output_dir": "out",
            "train_batch_size": 16,
            "guidance_scale": GUIDANCE,
            "snr_gamma": GAMMA if unet else None,
        }
    )
    process = family.noise_process(pipeline)
    drawn = draw(config, encoded, process, step=3, micro=0)
    assert set(drawn.rows.tolist()) == {0, 1, 2, 3}  # both pictures, plain and mirrored
    if kind == "sdxl-v-zero-snr":
        index = torch.cat([torch.zeros(1, dtype=torch.int64), drawn.index[1:]])  # pure noise comes first
        drawn = replace(drawn, index=index, weighting=level_weights(config, process, index))
    with torch.no_grad():
        ours = loss_of(family, getattr(pipeline, family.component), encoded, drawn, process, GUIDANCE)

    double = in_double(pipeline)
    pixels = torch.stack([example.pixels for example in examples])
    pixels = torch.cat([pixels, pixels.flip(-1)]).double()
    with torch.no_grad():
        latents = latents_of(family.name, double, pixels)
        given = (latents[drawn.rows], drawn.noise.double(), drawn.index)
        captions = [list(CAPTIONS.values())[row % 2] for row in drawn.rows.tolist()]
        if family.name == "sdxl":
            # rows and columns of the file, of the corner in the square's scale (32 / 36), of the target
            corners = ((41, 2), (50, 6), (41, 3), (50, 6))
            time_ids = torch.tensor([[36, width, 0, left, 32, 32] for width, left in corners])
            assert encoded.groups[0].picture_conditioning["time_ids"].tolist() == time_ids.tolist()
            expected = unet_loss(double, *given, captions, time_ids[drawn.rows].double())
        elif unet:
            expected = unet_loss(double, *given, captions, None)
        else:
            expected = flow_loss(family.name, double, *given, captions)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=0)
