"""Z-Image: `ZImagePipeline` with `ZImageTransformer2DModel`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qrlora.models._common import flow_matching, lengths_of, pad_rows, require
from qrlora.models._family import Family, GenerationDefaults
from qrlora.models._noise import NoiseProcess
from qrlora.models._registry import register_family


class ZImage(Family):
    """Attention of every block: the 30 that read picture and text as one sequence, and the refiners of either before.

    The denoiser counts time from noise (0) to clean (1) and points from noise to picture: it is given `1 - sigma`, and
    what it gives is the velocity's opposite. It takes lists of pictures and of prompts as long as they are.
    """

    name = "z-image"
    denoiser_class = "ZImageTransformer2DModel"
    pipeline_class = "ZImagePipeline"
    target_modules = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    text_components = ("text_encoder",)
    generation_defaults = GenerationDefaults(num_inference_steps=50, guidance_scale=4.0, max_sequence_length=512)
    training_defaults: ClassVar[Mapping[str, Any]] = {"resolution": 512}
    generation_arguments = ("height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length")
    guidance_off = 0.0

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        require(pipeline, self.text_components)
        self.check_length(max_sequence_length)
        with torch.no_grad():
            rows, _ = pipeline.encode_prompt(
                prompt=list(prompts),
                device=pipeline.text_encoder.device,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
            )
        return pad_rows(rows, max_sequence_length)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditioning: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        texts = self.pipeline_inputs(conditioning)["prompt_embeds"]
        frames = noisy.to(texts[0].dtype)[:, :, None]  # videos of one frame
        pictures = denoiser(list(frames), 1 - levels, texts, return_dict=False)[0]
        return -torch.stack(pictures)[:, :, 0]

    def pipeline_inputs(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        counts = lengths_of(rows)
        return {"prompt_embeds": [row[:count] for row, count in zip(rows["prompt_embeds"], counts, strict=True)]}

    def given_timesteps(self, pipeline: Any, timesteps: Tensor) -> Tensor:
        return (1000 - super().given_timesteps(pipeline, timesteps)) / 1000

    def noise_process(self, pipeline: Any) -> NoiseProcess:
        return flow_matching(pipeline.scheduler)

    def latent_channels(self, denoiser: Any) -> int:
        return int(denoiser.config.in_channels)

    def conditioning_shapes(self, denoiser: Any, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (max_sequence_length, denoiser.config.cap_feat_dim)}

    def latent_multiple(self, pipeline: Any) -> int:
        return int(pipeline.vae_scale_factor) * 2


Z_IMAGE = register_family(ZImage())
