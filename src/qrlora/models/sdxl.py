"""Stable Diffusion XL: `StableDiffusionXLPipeline` with `UNet2DConditionModel`, trained to predict noise or v."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qrlora.formats import Component
from qrlora.models._common import diffusion, require
from qrlora.models._family import Family, GenerationDefaults
from qrlora.models._noise import NoiseProcess
from qrlora.models._registry import register_family


class StableDiffusionXL(Family):
    """Self- and cross-attention of every transformer block.

    The denoiser is also told the size of the picture's file, where it was cropped and the size asked for
    (micro-conditioning, arXiv 2307.01952, section 2.2). Training tells each picture's own; the stock pipeline, which
    makes the pictures, tells an uncropped picture of the size asked for.
    """

    name = "sdxl"
    denoiser_class = "UNet2DConditionModel"
    pipeline_class = "StableDiffusionXLPipeline"
    component = "unet"
    target_modules = tuple(
        f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
    )
    # B-LoRA (arXiv 2403.14572): these two hold a picture's content and its style.
    blocks: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "b-lora": ("up_blocks.0.attentions.0-1",),
        "b-lora-content": ("up_blocks.0.attentions.0-0",),
        "b-lora-style": ("up_blocks.0.attentions.1-1",),
    }
    text_components = ("text_encoder", "text_encoder_2")
    trainable_encoders: ClassVar[tuple[Component, ...]] = ("text_encoder", "text_encoder_2")
    generation_defaults = GenerationDefaults(num_inference_steps=30, guidance_scale=5.0, max_sequence_length=77)
    training_defaults: ClassVar[Mapping[str, Any]] = {"resolution": 1024}
    generation_arguments = ("height", "width", "num_inference_steps", "guidance_scale")
    sequence_lengths = range(77, 78)

    def recognises(self, model: Any) -> bool:
        if not super().recognises(model):
            return False
        denoiser: Any = model if isinstance(model, nn.Module) else getattr(model, self.component, None)
        # Stable Diffusion 1 and 2 have the same class of U-Net, without micro-conditioning.
        return denoiser is None or denoiser.config.addition_embed_type == "text_time"

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        self.check_length(max_sequence_length)
        with torch.no_grad():
            return self.encode_again(pipeline, prompts, {})

    def encode_again(self, pipeline: Any, prompts: Sequence[str], cached: Mapping[str, Tensor]) -> dict[str, Tensor]:
        require(pipeline, self.text_components)
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=list(prompts),
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_negative(self, pipeline: Any, negative_prompt: str, max_sequence_length: int) -> dict[str, Tensor]:
        encoded = super().encode_negative(pipeline, negative_prompt, max_sequence_length)
        if _is_nothing(pipeline, negative_prompt):
            return {key: torch.zeros_like(rows) for key, rows in encoded.items()}
        return encoded

    def encode_negative_again(
        self, pipeline: Any, negative_prompt: str, cached: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if _is_nothing(pipeline, negative_prompt):
            return dict(cached)
        return super().encode_negative_again(pipeline, negative_prompt, cached)

    def picture_conditioning(
        self, original_sizes: Tensor, crops_top_left: Tensor, target_sizes: Tensor
    ) -> dict[str, Tensor]:
        return {"time_ids": torch.cat([original_sizes, crops_top_left, target_sizes], dim=1).float()}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditioning: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        told = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": conditioning["time_ids"]}
        return denoiser(
            sample=noisy.to(embeds.dtype),
            timestep=levels,
            encoder_hidden_states=embeds,
            added_cond_kwargs=told,
            return_dict=False,
        )[0]

    def noise_process(self, pipeline: Any) -> NoiseProcess:
        return diffusion(pipeline.scheduler, pipeline.unet)

    def latent_channels(self, denoiser: Any) -> int:
        return int(denoiser.config.in_channels)

    def conditioning_shapes(self, denoiser: Any, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        config, sizes = denoiser.config, 6
        return {
            "prompt_embeds": (max_sequence_length, config.cross_attention_dim),
            "pooled_prompt_embeds": (
                config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim,
            ),
            "time_ids": (sizes,),
        }

    def latent_multiple(self, pipeline: Any) -> int:
        return int(pipeline.vae_scale_factor)


def _is_nothing(pipeline: Any, negative_prompt: str) -> bool:
    """Whether the stock pipeline takes zeros instead of encoding it."""
    return not negative_prompt and bool(pipeline.config.force_zeros_for_empty_prompt)


SDXL = register_family(StableDiffusionXL())
