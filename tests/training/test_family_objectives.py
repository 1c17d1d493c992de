"""The loss of each family against its formula, written out in float64 around the stock denoiser."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from qrlora.data import encode_examples, load_examples
from qrlora.models import family_of
from qrlora.training import TrainConfig
from qrlora.training.objective import draw, level_weights, loss_of
from tests.tiny_pipelines import flux_pipeline, sd3_pipeline, sdxl_pipeline

GUIDANCE, GAMMA = 2.5, 5.0
KINDS: dict[str, Callable[[], Any]] = {
    "flux-dev": lambda: flux_pipeline(guidance_embeds=True),
    "flux-schnell": flux_pipeline,
    "sd3": sd3_pipeline,
    "sd3.5-medium": lambda: sd3_pipeline(dual_attention=True),
    "sd3-without-t5": lambda: sd3_pipeline(t5=False),
    "sdxl": sdxl_pipeline,
    "sdxl-v": lambda: sdxl_pipeline(prediction="v_prediction"),
    "sdxl-v-zero-snr": lambda: sdxl_pipeline(prediction="v_prediction", zero_snr=True),
}


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


def flow_loss(pipeline: Any, clean: Tensor, noise: Tensor, index: Tensor, rows: list[Any]) -> Tensor:
    """arXiv 2403.03206, equation 13 with uniform weights: x_s = (1 - s) x_0 + s e, v = e - x_0."""
    sigma = (1000 - index.double()) / 1000
    flux = isinstance(pipeline, FluxPipeline)
    if not flux:
        sigma = 3 * sigma / (1 + 2 * sigma)
    s = sigma[:, None, None, None]
    predict = flux_prediction if flux else sd3_prediction
    return (predict(pipeline, (1 - s) * clean + s * noise, sigma, rows) - (noise - clean)).square().mean()


def sdxl_loss(pipeline: Any, clean: Tensor, noise: Tensor, index: Tensor, rows: list[Any], time_ids: Tensor) -> Tensor:
    """arXiv 2006.11239, equation 12; v by arXiv 2202.00512; Min-SNR by arXiv 2303.09556."""
    config = pipeline.scheduler.config
    v = config.prediction_type == "v_prediction"
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    if config.rescale_betas_zero_snr:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    step = 999 - index
    signal, spread = (part[step][:, None, None, None] for part in (root, (1 - root**2).sqrt()))
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
        (tmp_path / f"{name}.txt").write_text(f"a photo of {name}")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_its_formula(kind: str, pictures: Path) -> None:
    pipeline = KINDS[kind]()
    family, sdxl = family_of(pipeline), kind.startswith("sdxl")
    examples = load_examples(pictures, None, 32)
    encoded = encode_examples(examples, family, pipeline, max_sequence_length=77 if sdxl else 16, random_flip=True)
    config = TrainConfig.parse(
        {
            "instance_data_dir": str(pictures),
            "output_dir": "out",
            "train_batch_size": 16,
            "guidance_scale": GUIDANCE,
            "snr_gamma": GAMMA if sdxl else None,
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
    vae = double.vae.config
    with torch.no_grad():
        latents = (double.vae.encode(pixels).latent_dist.mode() - (vae.shift_factor or 0)) * vae.scaling_factor
        given = (latents[drawn.rows], drawn.noise.double(), drawn.index)
        captions = [("a photo of a", "a photo of b")[row % 2] for row in drawn.rows.tolist()]
        if sdxl:
            # rows and columns of the file, of the corner in the square's scale (32 / 36), of the target
            corners = ((41, 2), (50, 6), (41, 3), (50, 6))
            time_ids = torch.tensor([[36, width, 0, left, 32, 32] for width, left in corners])
            assert encoded.groups[0].picture_conditioning["time_ids"].tolist() == time_ids.tolist()
            expected = sdxl_loss(double, *given, captions, time_ids[drawn.rows].double())
        else:
            expected = flow_loss(double, *given, captions)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=0)
