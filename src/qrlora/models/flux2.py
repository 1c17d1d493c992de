"""FLUX.2: dev (`Flux2Pipeline`) and klein (`Flux2KleinPipeline`), both with `Flux2Transformer2DModel`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qrlora.errors import QrloraError
from qrlora.models._common import flow_matching, raw_latents, remembered, require
from qrlora.models._family import Family, GenerationDefaults
from qrlora.models._noise import NoiseProcess
from qrlora.models._registry import register_family


class Flux2(Family):
    """FLUX.1's layer list: attention and feed-forward of the double blocks, attention of the single blocks.

    Single blocks compute queries, keys, values and the feed-forward's input in one layer, which is adapted as a whole.

    Latents are the autoencoder's in 2 x 2 patches, `[N, 128, H/16, W/16]`, normalised channel by channel by statistics
    that it keeps (those of a batch norm).
    """

    name = "flux2"
    denoiser_class = "Flux2Transformer2DModel"
    pipeline_class = "Flux2Pipeline"
    target_modules = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_qkv_mlp_proj",
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
    )
    text_components = ("text_encoder",)
    generation_defaults = GenerationDefaults(num_inference_steps=50, guidance_scale=4.0)
    training_defaults: ClassVar[Mapping[str, Any]] = {"resolution": 512}
    generation_arguments = ("height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length")
    guidance_off = float("inf")  # the pipeline of dev has no classifier-free guidance at all
    embeds_guidance: ClassVar[bool] = True
    """Whether its denoisers are told the guidance scale, which tells dev's and klein's apart."""

    def recognises(self, model: Any) -> bool:
        known = super().recognises(model)
        if not known or not isinstance(model, nn.Module):
            return known
        return self.has_guidance_embedding(model) == self.embeds_guidance

    def has_guidance_embedding(self, denoiser: nn.Module) -> bool:
        inner: Any = getattr(denoiser, "module", denoiser)  # a DistributedDataParallel wrapper hides the configuration
        return bool(inner.config.guidance_embeds)

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        require(pipeline, self.text_components)
        self.check_length(max_sequence_length)
        with torch.no_grad():
            embeds, _ = pipeline.encode_prompt(
                prompt=list(prompts), device=pipeline.text_encoder.device, max_sequence_length=max_sequence_length
            )
        return {"prompt_embeds": embeds}

    def encode_pictures(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        require(pipeline, self.picture_components)
        patches = patch(raw_latents(pipeline.vae, pixels, generator))
        mean, deviation = _statistics(pipeline.vae)
        return (patches - mean) / deviation

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditioning: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        _, _, height, width = noisy.shape
        embeds = conditioning["prompt_embeds"]
        image_ids, text_ids = _position_ids(height, width, embeds.shape[1], str(noisy.device))
        scale = noisy.new_full((noisy.shape[0],), guidance) if self.has_guidance_embedding(denoiser) else None
        tokens = denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(embeds.dtype),
            encoder_hidden_states=embeds,
            timestep=levels,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=scale,
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def given_timesteps(self, pipeline: Any, timesteps: Tensor) -> Tensor:
        return super().given_timesteps(pipeline, timesteps) / 1000

    def noise_process(self, pipeline: Any) -> NoiseProcess:
        return flow_matching(pipeline.scheduler)

    def latent_channels(self, denoiser: Any) -> int:
        return int(denoiser.config.in_channels)

    def conditioning_shapes(self, denoiser: Any, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (max_sequence_length, denoiser.config.joint_attention_dim)}

    def latent_multiple(self, pipeline: Any) -> int:
        return int(pipeline.vae_scale_factor) * 2

    def latent_scale(self, autoencoder: Mapping[str, Any]) -> int:
        return super().latent_scale(autoencoder) * 2


class Flux2Klein(Flux2):
    """Klein, base and distilled: Qwen3 reads its prompts; base is guided without a classifier, distilled is not."""

    name = "flux2-klein"
    pipeline_class = "Flux2KleinPipeline"
    guidance_off = 1.0
    embeds_guidance = False

    def defaults_of(self, pipeline: Any) -> GenerationDefaults:
        if not pipeline.config.is_distilled:
            return self.generation_defaults
        return self.generation_defaults.model_copy(update={"num_inference_steps": 4, "guidance_scale": 1.0})

    def check_settings(self, pipeline: Any, settings: GenerationDefaults) -> None:
        super().check_settings(pipeline, settings)
        if pipeline.config.is_distilled and settings.guidance_scale > self.guidance_off:
            raise QrloraError(
                f"guidance_scale={settings.guidance_scale} has no effect on this model, which was distilled to do "
                "without; leave it at 1, or take the base model."
            )


def patch(latents: Tensor) -> Tensor:
    """`[N, C, h, w]` to `[N, 4 C, h/2, w/2]`: 2 x 2 patches, channel-major within a patch."""
    count, channels, height, width = latents.shape
    patches = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(count, channels * 4, height // 2, width // 2)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the patched latents' channels, `[1, 4 C, 1, 1]`."""
    mean, variance = (each.float()[None, :, None, None] for each in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


@remembered
def _position_ids(rows: int, columns: int, text_length: int, device: str) -> tuple[Tensor, Tensor]:
    """Time, row, column and place in the text: pictures have rows and columns, texts the last alone."""
    image = torch.zeros(rows, columns, 4)
    image[..., 1] = torch.arange(rows)[:, None]
    image[..., 2] = torch.arange(columns)[None, :]
    text = torch.zeros(text_length, 4)
    text[:, 3] = torch.arange(text_length)
    return image.reshape(-1, 4).to(device), text.to(device)


FLUX2 = register_family(Flux2())
FLUX2_KLEIN = register_family(Flux2Klein())
