"""FLUX.1: `FluxPipeline` with `FluxTransformer2DModel`, dev (guidance embedding) and schnell-like (none) alike."""

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from qrlora.errors import QrloraError
from qrlora.models._family import Family, register_family

_MAX_TOKENS = 512  # FluxPipeline's own limit


class Flux(Family):
    """The published layer list: attention and feed-forward of the double blocks, attention of the single blocks."""

    name = "flux"
    denoiser_class = "FluxTransformer2DModel"
    pipeline_class = "FluxPipeline"
    target_modules = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    text_components = ("text_encoder", "text_encoder_2")
    training_defaults: ClassVar[Mapping[str, Any]] = {"resolution": 512}

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        _require(pipeline, self.text_components)
        _check_length(max_sequence_length)
        with torch.no_grad():
            embeds, pooled, _ = pipeline.encode_prompt(
                prompt=list(prompts),
                prompt_2=None,
                device=pipeline.text_encoder.device,
                max_sequence_length=max_sequence_length,
            )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_pictures(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _require(pipeline, self.picture_components)
        vae = pipeline.vae
        with torch.no_grad():
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, sigmas: Tensor, conditioning: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        inner: Any = getattr(denoiser, "module", denoiser)  # a DistributedDataParallel wrapper hides the configuration
        _, _, height, width = noisy.shape
        embeds = conditioning["prompt_embeds"]
        image_ids, text_ids = _position_ids(height // 2, width // 2, embeds.shape[1], str(noisy.device))
        scale = noisy.new_full((noisy.shape[0],), guidance) if inner.config.guidance_embeds else None
        packed = denoiser(
            hidden_states=pack(noisy).to(embeds.dtype),
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            timestep=sigmas,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=scale,
            return_dict=False,
        )[0]
        return unpack(packed, height, width)

    def sigma_table(self, pipeline: Any) -> Tensor:
        # A fresh scheduler: generating leaves the pipeline's own one on a short table.
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        return scheduler.sigmas[: scheduler.config.num_train_timesteps].float()

    def generate(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        true_cfg_scale: float,
        negative_prompt: str,
        max_sequence_length: int,
        batch_size: int = 1,
        conditioning: Mapping[str, Tensor] | None = None,
        negative_conditioning: Mapping[str, Tensor] | None = None,
    ) -> list[Image.Image]:
        if len(seeds) != len(prompts):
            raise QrloraError(
                f"{len(prompts)} prompts need {len(prompts)} seeds, one a picture, but {len(seeds)} were given."
            )
        _check_size(self.latent_multiple(pipeline), height, width)
        _check_length(max_sequence_length)
        device, dtype = pipeline.transformer.device, pipeline.transformer.dtype
        if conditioning is None:
            conditioning = self._encode_each_once(pipeline, prompts, max_sequence_length)
        conditioning = {key: rows.to(device, dtype) for key, rows in conditioning.items()}
        negative: dict[str, Tensor] = {}
        if true_cfg_scale > 1:
            if negative_conditioning is None:
                negative_conditioning = self.encode_prompts(pipeline, [negative_prompt], max_sequence_length)
            negative = {f"negative_{key}": rows.to(device, dtype) for key, rows in negative_conditioning.items()}
        pictures: list[Image.Image] = []
        maker = _quiet(pipeline)
        for start in range(0, len(prompts), batch_size):
            rows = range(start, min(start + batch_size, len(prompts)))
            pictures += maker(
                **{key: value[start : rows.stop] for key, value in conditioning.items()},
                **{key: value.expand(len(rows), *value.shape[1:]) for key, value in negative.items()},
                # On the CPU whatever the device: the same seed gives the same noise everywhere.
                generator=[torch.Generator("cpu").manual_seed(seeds[row]) for row in rows],
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                true_cfg_scale=true_cfg_scale,
                max_sequence_length=max_sequence_length,
            ).images
        return pictures

    def _encode_each_once(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        unique = list(dict.fromkeys(prompts))
        rows = [self.encode_prompts(pipeline, [prompt], max_sequence_length) for prompt in unique]
        order = [unique.index(prompt) for prompt in prompts]
        return {key: torch.cat([rows[index][key] for index in order]) for key in rows[0]} if rows else {}


def pack(latents: Tensor) -> Tensor:
    """`[N, C, h, w]` to `[N, h/2 * w/2, 4 C]`: FLUX's tokens are 2 x 2 patches, channel-major within a token."""
    count, channels, height, width = latents.shape
    patches = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack`; `height` and `width` are those of the latents."""
    count, _, features = tokens.shape
    patches = tokens.reshape(count, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(count, features // 4, height, width)


@lru_cache(maxsize=8)
def _position_ids(rows: int, columns: int, text_length: int, device: str) -> tuple[Tensor, Tensor]:
    image = torch.zeros(rows, columns, 3)
    image[..., 1] = torch.arange(rows)[:, None]
    image[..., 2] = torch.arange(columns)[None, :]
    return image.reshape(-1, 3).to(device), torch.zeros(text_length, 3, device=device)


def _check_size(multiple: int, height: int, width: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if value % multiple:
            raise QrloraError(
                f"{name}={value} must be a multiple of {multiple} for this model; {round_to(value, multiple)} is."
            )


def _check_length(tokens: int) -> None:
    if tokens > _MAX_TOKENS:
        raise QrloraError(f"max_sequence_length={tokens} is above {_MAX_TOKENS}, the most that FLUX takes; lower it.")


def round_to(value: int, multiple: int) -> int:
    """The nearest positive multiple."""
    return max(multiple, round(value / multiple) * multiple)


def _require(pipeline: Any, components: tuple[str, ...]) -> None:
    missing = [name for name in components if getattr(pipeline, name, None) is None]
    if missing:
        raise QrloraError(
            f"the pipeline has no {' and '.join(missing)}; they were freed for training: restore_encoders() brings "
            "them back."
        )


def _quiet(pipeline: Any) -> Any:
    """The same components behind a pipeline object that draws no progress bar, leaving the caller's as it is."""
    quiet = copy.copy(pipeline)
    quiet.set_progress_bar_config(disable=True)
    return quiet


FLUX = register_family(Flux())
