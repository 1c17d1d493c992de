"""The strategy that one training loop and one `generate` need of a model family, and the registry of families."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from qrlora.adapter import register_targets
from qrlora.errors import QrloraError


class GenerationDefaults(BaseModel):
    """How a model wants its pictures made; the names are those of the diffusers pipelines."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(default=1024, gt=0)
    """Pixels."""
    width: int = Field(default=1024, gt=0)
    """Pixels."""
    num_inference_steps: int = Field(default=28, gt=0)
    guidance_scale: float = Field(default=3.5, allow_inf_nan=False)
    """Distilled guidance (an embedding); without effect on a model that has no guidance embedding."""
    true_cfg_scale: float = Field(default=1.0, allow_inf_nan=False)
    """Classifier-free guidance against `negative_prompt`; 1 is off, above 1 every step costs two passes."""
    negative_prompt: str = ""
    max_sequence_length: int = Field(default=512, gt=0)
    """Tokens of the long text encoder, in training and in generation alike."""


class Family(ABC):
    """One model family. Stateless: everything it works on is passed in.

    Latents are `[N, C, h, w]`, normalised as the denoiser expects them (shifted, scaled, never packed). Conditioning is
    a dictionary of tensors with one row a prompt. Velocities are `noise - latents`, the flow-matching target.
    """

    name: ClassVar[str]
    denoiser_class: ClassVar[str]
    pipeline_class: ClassVar[str]
    component: ClassVar[str] = "transformer"
    target_modules: ClassVar[tuple[str, ...]]
    """Whole path components at the end of a module's path, adapted when `target_modules="auto"`."""
    text_components: ClassVar[tuple[str, ...]]
    """Pipeline components needed for prompts alone, freed while training."""
    picture_components: ClassVar[tuple[str, ...]] = ("vae",)
    """Pipeline components needed for pictures alone, freed while training unless validation decodes."""
    generation_defaults: ClassVar[GenerationDefaults] = GenerationDefaults()
    training_defaults: ClassVar[Mapping[str, Any]] = {}

    def denoiser(self, pipeline: Any) -> nn.Module:
        """The module that is adapted and trained."""
        return getattr(pipeline, self.component)

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
        """Conditioning, one row a prompt, in the encoders' dtype and on their device."""

    @abstractmethod
    def encode_pictures(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`pixels` `[N, 3, H, W]` in [-1, 1] to latents `[N, C, h, w]`; the mode without a generator, else a sample."""

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Tensor, sigmas: Tensor, conditioning: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """The velocity `[N, C, h, w]` at `noisy` with noise levels `sigmas` `[N]` in (0, 1].

        `conditioning` has one row an item, in the denoiser's dtype (asking the denoiser for it costs milliseconds).
        """

    @abstractmethod
    def sigma_table(self, pipeline: Any) -> Tensor:
        """Noise levels `[T]` to draw from in training, largest first, as the pipeline's own scheduler spaces them."""

    @abstractmethod
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
        """One picture a prompt and seed, each from a generator of its own.

        With `batch_size` 1 a picture does not depend on its company to the last bit; larger batches are quicker and
        differ by rounding (now and then one grey level in a pixel). `conditioning` and `negative_conditioning`, rows as
        returned by `encode_prompts`, replace the text encoders, which may then be absent.
        """

    def latent_multiple(self, pipeline: Any) -> int:
        """Height and width in pixels must be multiples of this."""
        return int(pipeline.vae_scale_factor) * 2


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known by its denoiser's class, and tell the adapters what `target_modules="auto"` means for it."""
    register_targets(family.denoiser_class, family.target_modules)
    _FAMILIES[family.denoiser_class] = family
    return family


def family_names() -> tuple[str, ...]:
    """Names of the families known, sorted."""
    return tuple(sorted(family.name for family in _FAMILIES.values()))


def family_of(model: Any) -> Family:
    """The family of a denoiser or of a pipeline, by class name.

    Raises:
        QrloraError: an unknown class; the sentence lists the known ones.
    """
    seen = type(model).__name__
    for family in _FAMILIES.values():
        denoiser = model if isinstance(model, nn.Module) else getattr(model, family.component, None)
        if type(denoiser).__name__ == family.denoiser_class:
            return family
    known = ", ".join(f"{family.name} ({name}, {family.pipeline_class})" for name, family in sorted(_FAMILIES.items()))
    raise QrloraError(f"{seen} belongs to no model family known here; the known ones are {known}.")
