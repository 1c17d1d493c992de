"""FLUX.1: `FluxPipeline` with `FluxTransformer2DModel`, dev (guidance embedding) and schnell-like (none) alike."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qrlora.formats import Component
from qrlora.models._common import flow_matching, pack, remembered, require, unpack
from qrlora.models._family import Family, GenerationDefaults
from qrlora.models._noise import NoiseProcess
from qrlora.models._registry import register_family


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
    # SplitFlux (arXiv 2511.15258): content forms in the early single blocks, style in the later ones.
    blocks: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "splitflux": ("single_transformer_blocks",),
        "splitflux-content": ("single_transformer_blocks.0-9",),
        "splitflux-style": ("single_transformer_blocks.10-37",),
    }
    text_components = ("text_encoder", "text_encoder_2")
    trainable_encoders: ClassVar[tuple[Component, ...]] = ("text_encoder",)
    training_defaults: ClassVar[Mapping[str, Any]] = {"resolution": 512}
    guided_by = "true_cfg_scale"
    generation_arguments = (
        "height",
        "width",
        "num_inference_steps",
        "guidance_scale",
        "true_cfg_scale",
        "max_sequence_length",
    )

    def defaults_of(self, pipeline: Any) -> GenerationDefaults:
        if self.has_guidance_embedding(pipeline.transformer):
            return self.generation_defaults
        return GenerationDefaults(num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256)  # schnell

    def has_guidance_embedding(self, denoiser: nn.Module) -> bool:
        inner: Any = getattr(denoiser, "module", denoiser)  # a DistributedDataParallel wrapper hides the configuration
        return bool(inner.config.guidance_embeds)

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        require(pipeline, self.text_components)
        self.check_length(max_sequence_length)
        with torch.no_grad():
            embeds, pooled, _ = pipeline.encode_prompt(
                prompt=list(prompts),
                prompt_2=None,
                device=pipeline.text_encoder.device,
                max_sequence_length=max_sequence_length,
            )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_again(self, pipeline: Any, prompts: Sequence[str], cached: Mapping[str, Tensor]) -> dict[str, Tensor]:
        require(pipeline, self.trainable_encoders)
        # Of CLIP, FLUX takes the pooled embedding alone.
        pooled = pipeline._get_clip_prompt_embeds(prompt=list(prompts), device=pipeline.text_encoder.device)
        return {**cached, "pooled_prompt_embeds": pooled}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditioning: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        _, _, height, width = noisy.shape
        embeds = conditioning["prompt_embeds"]
        image_ids, text_ids = _position_ids(height // 2, width // 2, embeds.shape[1], str(noisy.device))
        scale = noisy.new_full((noisy.shape[0],), guidance) if self.has_guidance_embedding(denoiser) else None
        packed = denoiser(
            hidden_states=pack(noisy).to(embeds.dtype),
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            timestep=levels,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=scale,
            return_dict=False,
        )[0]
        return unpack(packed, height, width)

    def given_timesteps(self, pipeline: Any, timesteps: Tensor) -> Tensor:
        return super().given_timesteps(pipeline, timesteps) / 1000

    def noise_process(self, pipeline: Any) -> NoiseProcess:
        return flow_matching(pipeline.scheduler)

    def latent_channels(self, denoiser: Any) -> int:
        return int(denoiser.config.in_channels) // 4

    def conditioning_shapes(self, denoiser: Any, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        config = denoiser.config
        return {
            "prompt_embeds": (max_sequence_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def latent_multiple(self, pipeline: Any) -> int:
        return int(pipeline.vae_scale_factor) * 2


@remembered
def _position_ids(rows: int, columns: int, text_length: int, device: str) -> tuple[Tensor, Tensor]:
    image = torch.zeros(rows, columns, 3)
    image[..., 1] = torch.arange(rows)[:, None]
    image[..., 2] = torch.arange(columns)[None, :]
    return image.reshape(-1, 3).to(device), torch.zeros(text_length, 3, device=device)


FLUX = register_family(Flux())
