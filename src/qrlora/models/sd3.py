"""Stable Diffusion 3 and 3.5: `StableDiffusion3Pipeline` with `SD3Transformer2DModel`, medium and large."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qrlora.errors import QrloraError
from qrlora.formats import Component
from qrlora.models._common import flow_matching, require
from qrlora.models._family import Family, GenerationDefaults
from qrlora.models._noise import NoiseProcess
from qrlora.models._registry import register_family

_CLIP_TOKENS = 77


class StableDiffusion3(Family):
    """Joint attention of every block, both streams; not the second, picture-only attention of SD3.5-medium (attn2).

    That is the list of QR-LoRA's SD3 fork. T5 may be absent (`text_encoder_3=None`): its part of the embeddings is then
    zero, as the stock pipeline has it.
    """

    name = "sd3"
    denoiser_class = "SD3Transformer2DModel"
    pipeline_class = "StableDiffusion3Pipeline"
    target_modules = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    text_components = ("text_encoder", "text_encoder_2", "text_encoder_3")
    trainable_encoders: ClassVar[tuple[Component, ...]] = ("text_encoder", "text_encoder_2")
    optional_components = ("text_encoder_3",)
    generation_defaults = GenerationDefaults(num_inference_steps=28, guidance_scale=7.0, max_sequence_length=256)
    training_defaults: ClassVar[Mapping[str, Any]] = {"resolution": 512}
    generation_arguments = ("height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length")

    def defaults_of(self, pipeline: Any) -> GenerationDefaults:
        config = pipeline.transformer.config
        if config.qk_norm is None:
            return self.generation_defaults
        medium = bool(config.dual_attention_layers)
        told = {"num_inference_steps": 40, "guidance_scale": 4.5} if medium else {"guidance_scale": 3.5}
        return self.generation_defaults.model_copy(update=told)  # of the model cards of 3.5-medium and 3.5-large

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        require(pipeline, ("text_encoder", "text_encoder_2"))
        self.check_length(max_sequence_length)
        with torch.no_grad():
            return self._encode(pipeline, prompts, max_sequence_length)

    def encode_again(self, pipeline: Any, prompts: Sequence[str], cached: Mapping[str, Tensor]) -> dict[str, Tensor]:
        require(pipeline, self.trainable_encoders)
        clips = copy.copy(pipeline)
        clips.text_encoder_3 = None  # its part, behind that of the others, is zero then, and taken from `cached`
        encoded, tokens = self._encode(clips, prompts, 1), int(pipeline.tokenizer_max_length)
        behind = cached["prompt_embeds"][:, tokens:]
        return {**encoded, "prompt_embeds": torch.cat([encoded["prompt_embeds"][:, :tokens], behind], dim=1)}

    def _encode(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_pictures(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.check_size(pipeline, pixels.shape[-2], pixels.shape[-1])
        return super().encode_pictures(pipeline, pixels, generator)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditioning: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        return denoiser(
            hidden_states=noisy.to(embeds.dtype),
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            timestep=levels * 1000,
            return_dict=False,
        )[0]

    def noise_process(self, pipeline: Any) -> NoiseProcess:
        return flow_matching(pipeline.scheduler)

    def latent_channels(self, denoiser: Any) -> int:
        return int(denoiser.config.in_channels)

    def conditioning_shapes(self, denoiser: Any, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        config = denoiser.config
        return {
            "prompt_embeds": (_CLIP_TOKENS + max_sequence_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def latent_multiple(self, pipeline: Any) -> int:
        return int(pipeline.vae_scale_factor) * int(pipeline.patch_size)

    def check_size(self, pipeline: Any, height: int, width: int) -> None:
        super().check_size(pipeline, height, width)
        # Positions are cut from the middle of a stored table; there is nothing beyond it.
        largest = pipeline.transformer.config.pos_embed_max_size * self.latent_multiple(pipeline)
        for name, value in (("height", height), ("width", width)):
            if value > largest:
                raise QrloraError(f"{name}={value} is above {largest}, the most that this model has positions for.")


SD3 = register_family(StableDiffusion3())
