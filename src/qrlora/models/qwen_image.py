"""Qwen-Image: `QwenImagePipeline` with `QwenImageTransformer2DModel`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qrlora.errors import QrloraError
from qrlora.models._common import flow_matching, lengths_of, pack, pad_rows, raw_latents, require, unpack
from qrlora.models._family import Family, GenerationDefaults
from qrlora.models._noise import NoiseProcess
from qrlora.models._registry import register_family


class QwenImage(Family):
    """Joint attention of every block, both streams; of the last block not what makes its text, which is thrown away.

    Prompts stand in a template, whose beginning the pipeline drops again. They are padded to one length for the cache;
    the denoiser gets a batch as long as its longest prompt, with a mask where others are shorter, as in the pipeline.
    """

    name = "qwen-image"
    denoiser_class = "QwenImageTransformer2DModel"
    pipeline_class = "QwenImagePipeline"
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
    text_components = ("text_encoder",)
    generation_defaults = GenerationDefaults(
        num_inference_steps=50, guidance_scale=1.0, true_cfg_scale=4.0, negative_prompt=" ", max_sequence_length=512
    )
    training_defaults: ClassVar[Mapping[str, Any]] = {"resolution": 512}
    guided_by = "true_cfg_scale"
    generation_arguments = ("height", "width", "num_inference_steps", "true_cfg_scale", "max_sequence_length")
    sequence_lengths = range(1, 1025)

    def recognises(self, model: Any) -> bool:
        if not super().recognises(model):
            return False
        config: Any = getattr(model if isinstance(model, nn.Module) else getattr(model, self.component), "config", None)
        # Siblings of the same class that edit or layer pictures take more than a prompt; diffusers marks them so.
        return config is None or not (config.guidance_embeds or config.zero_cond_t or config.use_layer3d_rope)

    def check_settings(self, pipeline: Any, settings: GenerationDefaults) -> None:
        super().check_settings(pipeline, settings)
        if settings.guidance_scale != 1:
            raise QrloraError(
                f"guidance_scale={settings.guidance_scale} has no meaning for {self.name}, whose classifier-free "
                "guidance is true_cfg_scale; leave it at 1."
            )

    def idle_layers(self, denoiser: nn.Module) -> Collection[str]:
        blocks: Any = denoiser.get_submodule("transformer_blocks")
        last = f"transformer_blocks.{len(blocks) - 1}.attn"
        return {f"{last}.add_q_proj", f"{last}.to_add_out"}

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        require(pipeline, self.text_components)
        self.check_length(max_sequence_length)
        with torch.no_grad():
            embeds, mask = pipeline.encode_prompt(
                prompt=list(prompts), device=pipeline.text_encoder.device, max_sequence_length=max_sequence_length
            )
        counts = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(dim=1).tolist()
        return pad_rows([row[:count] for row, count in zip(embeds, counts, strict=True)], max_sequence_length)

    def encode_pictures(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        require(pipeline, self.picture_components)
        vae = pipeline.vae
        latents = raw_latents(vae, self.autoencoder_input(pixels), generator)[:, :, 0]
        mean, deviation = (
            torch.tensor(each, device=latents.device)[None, :, None, None]
            for each in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (latents - mean) / deviation

    def autoencoder_input(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, None]  # a video of one frame

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditioning: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        _, _, height, width = noisy.shape
        counts = lengths_of(conditioning)
        embeds = conditioning["prompt_embeds"][:, : max(counts)]
        mask = conditioning["prompt_embeds_mask"][:, : max(counts)] if min(counts) < max(counts) else None
        packed = denoiser(
            hidden_states=pack(noisy).to(embeds.dtype),
            timestep=levels,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(packed, height, width)

    def pipeline_inputs(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        longest = max(lengths_of(rows), default=0)
        return {key: value[:, :longest] for key, value in rows.items()}

    def given_timesteps(self, pipeline: Any, timesteps: Tensor) -> Tensor:
        return super().given_timesteps(pipeline, timesteps) / 1000

    def noise_process(self, pipeline: Any) -> NoiseProcess:
        return flow_matching(pipeline.scheduler)

    def latent_channels(self, denoiser: Any) -> int:
        return int(denoiser.config.in_channels) // 4

    def conditioning_shapes(self, denoiser: Any, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (max_sequence_length, denoiser.config.joint_attention_dim)}

    def latent_multiple(self, pipeline: Any) -> int:
        return int(pipeline.vae_scale_factor) * 2

    def latent_scale(self, autoencoder: Mapping[str, Any]) -> int:
        return 2 ** len(autoencoder["temperal_downsample"])


QWEN_IMAGE = register_family(QwenImage())
