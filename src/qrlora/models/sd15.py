"""Stable Diffusion 1 and 2: `StableDiffusionPipeline` with `UNet2DConditionModel`, trained to predict noise or v."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qrlora.formats import Component
from qrlora.models._common import diffusion, encode_latents, require
from qrlora.models._family import Family, GenerationDefaults
from qrlora.models._noise import NoiseProcess
from qrlora.models._registry import register_family


class StableDiffusion15(Family):
    """Self- and cross-attention of every transformer block, as in SDXL.

    A safety checker, where the pipeline has one, looks at pictures beside the autoencoder and blacks some out.
    """

    name = "sd15"
    denoiser_class = "UNet2DConditionModel"
    pipeline_class = "StableDiffusionPipeline"
    component = "unet"
    target_modules = tuple(
        f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
    )
    text_components = ("text_encoder",)
    trainable_encoders: ClassVar[tuple[Component, ...]] = ("text_encoder",)
    picture_components = ("vae", "safety_checker")
    generation_defaults = GenerationDefaults(
        height=512, width=512, num_inference_steps=30, guidance_scale=7.5, max_sequence_length=77
    )
    training_defaults: ClassVar[Mapping[str, Any]] = {"resolution": 512}
    generation_arguments = ("height", "width", "num_inference_steps", "guidance_scale")
    sequence_lengths = range(77, 78)

    def recognises(self, model: Any) -> bool:
        if not super().recognises(model):
            return False
        denoiser: Any = model if isinstance(model, nn.Module) else getattr(model, self.component, None)
        # SDXL's is told sizes and crops; those for filling in see the picture and the mask in more channels.
        return denoiser is None or (denoiser.config.addition_embed_type is None and denoiser.config.in_channels == 4)

    def defaults_of(self, pipeline: Any) -> GenerationDefaults:
        size = pipeline.unet.config.sample_size  # 64; 96 of Stable Diffusion 2
        if not isinstance(size, int):
            return self.generation_defaults
        side = size * pipeline.vae_scale_factor
        return self.generation_defaults.model_copy(update={"height": side, "width": side})

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        self.check_length(max_sequence_length)
        with torch.no_grad():
            return self.encode_again(pipeline, prompts, {})

    def encode_again(self, pipeline: Any, prompts: Sequence[str], cached: Mapping[str, Tensor]) -> dict[str, Tensor]:
        require(pipeline, self.text_components)
        embeds, _ = pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, 1, False)
        return {"prompt_embeds": embeds}

    def encode_pictures(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        require(pipeline, ("vae",))  # whoever has no safety checker needs none
        return encode_latents(pipeline.vae, pixels, generator)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditioning: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        return denoiser(
            sample=noisy.to(embeds.dtype), timestep=levels, encoder_hidden_states=embeds, return_dict=False
        )[0]

    def noise_process(self, pipeline: Any) -> NoiseProcess:
        return diffusion(pipeline.scheduler, pipeline.unet)

    def latent_channels(self, denoiser: Any) -> int:
        return int(denoiser.config.in_channels)

    def conditioning_shapes(self, denoiser: Any, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (max_sequence_length, denoiser.config.cross_attention_dim)}

    def latent_multiple(self, pipeline: Any) -> int:
        return int(pipeline.vae_scale_factor)


SD15 = register_family(StableDiffusion15())
