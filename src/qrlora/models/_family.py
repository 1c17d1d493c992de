"""The strategy that one training loop and one `generate` need of a model family."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from qrlora.errors import QrloraError
from qrlora.formats import Component
from qrlora.models._common import check_size, encode_latents, quiet, require
from qrlora.models._noise import NoiseProcess


class GenerationDefaults(BaseModel):
    """How a model wants its pictures made; the names are those of the diffusers pipelines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(default=1024, gt=0)
    """Pixels."""
    width: int = Field(default=1024, gt=0)
    """Pixels."""
    num_inference_steps: int = Field(default=28, gt=0)
    guidance_scale: float = Field(default=3.5, allow_inf_nan=False)
    """As the model's own pipeline means it. FLUX: distilled guidance, an embedding, without effect on a model that has
    none (schnell). SD, SD3, SDXL, FLUX.2-klein: classifier-free guidance against `negative_prompt`; 1 is off, above 1
    every step costs two passes. Z-Image: the same, but off at 0. Qwen-Image refuses it."""
    true_cfg_scale: float = Field(default=1.0, allow_inf_nan=False)
    """FLUX.1 and Qwen-Image alone: classifier-free guidance against `negative_prompt`, likewise; others refuse it."""
    negative_prompt: str = ""
    """What pictures are guided away from; empty is what the model's own pipeline takes without one."""
    max_sequence_length: int = Field(default=512, gt=0)
    """Tokens of the long text encoder (T5, a language model), in training and in generation alike; SD and SDXL have
    none and always read 77."""


class Family(ABC):
    """One model family. Stateless: everything it works on is passed in.

    Latents are `[N, C, h, w]`, normalised as the denoiser expects them (shifted, scaled, never packed). Conditioning is
    a dictionary of tensors with one row a prompt; prompts of different lengths are padded, with a mask beside them
    where the denoiser is not to see that.
    """

    name: ClassVar[str]
    denoiser_class: ClassVar[str]
    pipeline_class: ClassVar[str]
    component: ClassVar[str] = "transformer"
    target_modules: ClassVar[tuple[str, ...]]
    """Whole path components at the end of a module's path, adapted when `target_modules="auto"`."""
    blocks: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Named parts of the network; see `qrlora.adapter.blocks`."""
    text_components: ClassVar[tuple[str, ...]]
    """Pipeline components needed for prompts alone, freed while training."""
    trainable_encoders: ClassVar[tuple[Component, ...]] = ()
    """Those of them that are CLIP encoders, which may be adapted together with the denoiser."""
    optional_components: ClassVar[tuple[str, ...]] = ()
    """Those of them that a pipeline may be without from the start."""
    picture_components: ClassVar[tuple[str, ...]] = ("vae",)
    """Pipeline components needed for pictures alone, freed while training unless validation decodes."""
    generation_defaults: ClassVar[GenerationDefaults] = GenerationDefaults()
    training_defaults: ClassVar[Mapping[str, Any]] = {}
    generation_arguments: ClassVar[tuple[str, ...]]
    """Which `GenerationDefaults` the pipeline takes under their own names; embeddings are handed over instead of
    prompts."""
    guided_by: ClassVar[Literal["guidance_scale", "true_cfg_scale"]] = "guidance_scale"
    """The setting that, above `guidance_off`, guides pictures away from `negative_prompt`."""
    guidance_off: ClassVar[float] = 1.0
    """The most that `guided_by` may be without guiding."""
    sequence_lengths: ClassVar[range] = range(1, 513)
    """What `max_sequence_length` may be."""

    def recognises(self, model: Any) -> bool:
        """Whether a denoiser, or a pipeline by its own class and its denoiser's, is of this family."""
        if isinstance(model, nn.Module):
            return type(model).__name__ == self.denoiser_class
        if self.pipeline_class not in {parent.__name__ for parent in type(model).__mro__}:
            return False
        denoiser = getattr(model, self.component, None)
        return denoiser is None or self.recognises(denoiser)

    def denoiser(self, pipeline: Any) -> nn.Module:
        """The module that is adapted and trained."""
        return getattr(pipeline, self.component)

    def defaults_of(self, pipeline: Any) -> GenerationDefaults:
        """How this very model wants its pictures made, as far as its configuration tells it from its siblings."""
        return self.generation_defaults

    def check_settings(self, pipeline: Any, settings: GenerationDefaults) -> None:
        """Refuse settings that mean nothing for this family, or for this very model.

        Raises:
            QrloraError: begins with the setting's name.
        """
        if self.guided_by != "true_cfg_scale" and settings.true_cfg_scale != 1:
            raise QrloraError(
                f"true_cfg_scale={settings.true_cfg_scale} has no meaning for {self.name}, whose classifier-free "
                "guidance is guidance_scale; leave it at 1."
            )
        self.check_length(settings.max_sequence_length)

    def check_length(self, tokens: int) -> None:
        """Refuse a `max_sequence_length` that the text encoders do not take.

        Raises:
            QrloraError: as said.
        """
        allowed = self.sequence_lengths
        if tokens not in allowed:
            wants = f"always {allowed[0]}" if len(allowed) == 1 else f"{allowed[0]} to {allowed[-1]}"
            raise QrloraError(f"max_sequence_length={tokens} is not possible for {self.name}: it is {wants}.")

    def uses_negative(self, settings: GenerationDefaults) -> bool:
        """Whether pictures at these settings are guided away from `negative_prompt`, at two passes a step."""
        return getattr(settings, self.guided_by) > self.guidance_off

    def has_guidance_embedding(self, denoiser: nn.Module) -> bool:
        """Whether the `guidance` of `predict` means anything to this denoiser."""
        return False

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        """Conditioning, one row a prompt, in the encoders' dtype and on their device."""

    def encode_negative(self, pipeline: Any, negative_prompt: str, max_sequence_length: int) -> dict[str, Tensor]:
        """What pictures are guided away from, one row; by the keys of `encode_prompts`."""
        return self.encode_prompts(pipeline, [negative_prompt], max_sequence_length)

    def encode_again(self, pipeline: Any, prompts: Sequence[str], cached: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditioning as the trainable encoders make it now, with gradients where these are enabled.

        Args:
            pipeline: with its trainable encoders; others may be absent.
            prompts: one row each.
            cached: what `encode_prompts` gave for the same prompts, on the encoders' device; what other encoders (T5)
                gave is taken from there.
        """
        raise QrloraError(f"the text encoders of {self.name} cannot be trained.")

    def encode_negative_again(
        self, pipeline: Any, negative_prompt: str, cached: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The same of what pictures are guided away from; `cached` is what `encode_negative` gave."""
        return self.encode_again(pipeline, [negative_prompt], cached)

    def encode_pictures(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`pixels` `[N, 3, H, W]` in [-1, 1] to latents `[N, C, h, w]`; the mode without a generator, else a sample."""
        require(pipeline, self.picture_components)
        return encode_latents(pipeline.vae, pixels, generator)

    def autoencoder_input(self, pixels: Tensor) -> Tensor:
        """`pixels` `[N, 3, H, W]` as the autoencoder takes them."""
        return pixels

    def picture_conditioning(
        self, original_sizes: Tensor, crops_top_left: Tensor, target_sizes: Tensor
    ) -> dict[str, Tensor]:
        """What the denoiser is told of training pictures beside their captions, one row a picture; kept in fp32.

        Args:
            original_sizes: `[N, 2]`, height and width in pixels of the files.
            crops_top_left: `[N, 2]`, row and column of the crop's corner in the resampled pictures.
            target_sizes: `[N, 2]`, height and width that are trained on.

        Returns:
            Rows that join those of `encode_prompts` in the `conditioning` of `predict`; nothing for most families.
        """
        return {}

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditioning: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """The denoiser's output `[N, C, h, w]` at `noisy`: a velocity, noise or v, as the noise process has it.

        Args:
            denoiser: possibly wrapped for several processes.
            noisy: `[N, C, h, w]`.
            levels: `[N]`, of the noise process.
            conditioning: one row an item, of its caption in the denoiser's dtype (asking the denoiser for that costs
                milliseconds), and of its picture.
            guidance: the guidance embedding, on models that have one.
        """

    @abstractmethod
    def noise_process(self, pipeline: Any) -> NoiseProcess:
        """The levels that training draws from, as the pipeline's own scheduler spaces them, and what is predicted."""

    def given_timesteps(self, pipeline: Any, timesteps: Tensor) -> Tensor:
        """`timesteps` (0 clean, 1000 pure noise) as the pipeline gives them to its denoiser, in the dtype they have."""
        return timesteps * (pipeline.scheduler.config.num_train_timesteps / 1000)

    @abstractmethod
    def latent_channels(self, denoiser: nn.Module) -> int:
        """C of the latents `[N, C, h, w]`, by the denoiser's configuration."""

    @abstractmethod
    def conditioning_shapes(self, denoiser: nn.Module, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """Shape of one row of everything in the `conditioning` of `predict`, by the denoiser's configuration."""

    @abstractmethod
    def latent_multiple(self, pipeline: Any) -> int:
        """Height and width in pixels must be multiples of this."""

    def latent_scale(self, autoencoder: Mapping[str, Any]) -> int:
        """Pixels of a side to one of the latents, by the autoencoder's configuration."""
        return 2 ** (len(autoencoder["block_out_channels"]) - 1)

    def idle_layers(self, denoiser: nn.Module) -> Collection[str]:
        """Paths of target layers whose outputs the denoiser throws away; "auto" leaves them out."""
        return ()

    def check_size(self, pipeline: Any, height: int, width: int) -> None:
        """Refuse pixels that the model cannot draw.

        Raises:
            QrloraError: begins with the side's name.
        """
        check_size(self.latent_multiple(pipeline), height, width)

    def pipeline_inputs(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """Rows of conditioning as the pipeline takes them, by the names of its arguments."""
        return dict(rows)

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
        """One picture a prompt and seed, each from a generator of its own, by the model's stock pipeline.

        With `batch_size` 1 a picture does not depend on its company to the last bit; larger batches are quicker and
        differ by rounding (now and then one grey level in a pixel). `conditioning` and `negative_conditioning`, rows as
        returned by `encode_prompts` and `encode_negative`, replace the text encoders, which may then be absent.

        Raises:
            QrloraError: settings without meaning here, a size that the model cannot draw, not a seed for each prompt.
        """
        settings = GenerationDefaults.model_construct(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            negative_prompt=negative_prompt,
            max_sequence_length=max_sequence_length,
        )
        if len(seeds) != len(prompts):
            raise QrloraError(f"{len(prompts)} prompts need {len(prompts)} seeds, but {len(seeds)} were given.")
        self.check_settings(pipeline, settings)
        self.check_size(pipeline, height, width)
        if conditioning is None:
            conditioning = self._encode_each_once(pipeline, prompts, max_sequence_length)
        negative: Mapping[str, Tensor] = {}
        if self.uses_negative(settings):
            negative = negative_conditioning or self.encode_negative(pipeline, negative_prompt, max_sequence_length)
        denoiser: Any = self.denoiser(pipeline)
        embeddings = {key: rows.to(denoiser.device, denoiser.dtype) for key, rows in conditioning.items()}
        against = {key: row.to(denoiser.device, denoiser.dtype) for key, row in negative.items()}
        arguments = {name: getattr(settings, name) for name in self.generation_arguments}
        maker = quiet(pipeline)
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            rows = range(start, min(start + batch_size, len(prompts)))
            towards = self.pipeline_inputs({key: value[start : rows.stop] for key, value in embeddings.items()})
            repeated = {key: row.expand(len(rows), *row.shape[1:]) for key, row in against.items()}
            away = self.pipeline_inputs(repeated) if repeated else {}
            pictures += maker(
                **towards,
                **{f"negative_{key}": value for key, value in away.items()},
                # On the CPU whatever the device: the same seed gives the same noise everywhere.
                generator=[torch.Generator("cpu").manual_seed(seeds[row]) for row in rows],
                **arguments,
            ).images
        return pictures

    def _encode_each_once(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        unique = list(dict.fromkeys(prompts))
        rows = [self.encode_prompts(pipeline, [prompt], max_sequence_length) for prompt in unique]
        order = [unique.index(prompt) for prompt in prompts]
        return {key: torch.cat([rows[index][key] for index in order]) for key in rows[0]} if rows else {}
