"""What a blend can be told. Light to import: no torch."""

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qrlora.errors import QrloraError

Weights = tuple[float, ...]


class BlendConfig(BaseModel):
    """From one picture of a thing and one picture of a style: two adapters, their exact merge, and a sheet of pictures.

    Without content and style the bundled samples are used, and without a model the embedded base: offline, on the CPU.
    Training settings left open are the model's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    content: Path | None = None
    """Picture of the thing, or a folder of pictures."""
    content_prompt: str | None = None
    """What the content pictures show, such as "a photo of a <c> dog"; not needed where they have captions."""
    style: Path | None = None
    """Picture in the style, or a folder of pictures."""
    style_prompt: str | None = None
    """What the style pictures show, such as "a cat in <s> style"."""
    content_adapter: tuple[Path, ...] = ()
    """Adapters trained before, used as the content instead of training one."""
    style_adapter: tuple[Path, ...] = ()
    """Adapters trained before, used as the style instead of training one."""
    prompt: str | None = None
    """What the merge is asked for, such as "a <c> dog in <s> style"."""
    output: Path = Path("out")
    """Folder for the adapters, the sheet, the pictures and the report."""
    overwrite: bool = False
    """Replace an earlier blend in the output folder."""
    resume: bool = False
    """Continue a blend that was interrupted in the output folder."""

    model: str | None = None
    """Hub id or local diffusers folder; none means the embedded base."""
    device: str | None = None
    """cpu, cuda, mps...; none means the best that is there."""
    memory: Literal["6gb", "8gb", "12gb", "16gb", "24gb", "max"] | None = None
    """For a card of that size: quantised and offloaded weights, recomputed activations, as far as the model needs."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the training and of every picture."""

    content_weights: Weights | None = None
    """Rows of the sheet. None is the model's own choice, else 0 0.5 0.75 1."""
    style_weights: Weights | None = None
    """Columns of the sheet. None is the model's own choice (the embedded base: 0 0.7 1 1.4), else 0 0.5 0.75 1."""
    content_weight: float | None = None
    """Weight of the content in merged.safetensors. None is the model's own choice, else 1."""
    style_weight: float | None = None
    """Weight of the style in merged.safetensors. None is the model's own choice (the embedded base: 1.4), else 1."""
    content_blocks: str | None = None
    """The part of the network the content may change, such as splitflux-content or b-lora-content: trained there alone,
    unless its --content-config says adapter.blocks, and used there alone."""
    style_blocks: str | None = None
    """The part of the network the style may change, such as splitflux-style or b-lora-style."""
    content_timesteps: tuple[float, float] | None = None
    """Lowest and highest timestep at which the content acts, such as 500 1000 (early): trained there alone, unless its
    --content-config says min_timestep or max_timestep, and used there alone. 0 is clean, 1000 pure noise. A merged file
    cannot carry ranges and acts at all timesteps."""
    style_timesteps: tuple[float, float] | None = None
    """Lowest and highest timestep at which the style acts, such as 0 700 (late)."""
    method: str = "auto"
    """How the adapters are merged: auto, sum, concat... With k-lora, which chooses one of them for each layer and step
    while it draws, there is no merged file."""
    content_looks: tuple[str, ...] | None = None
    """Also train the content on its picture in these looks, each named in the caption, so that it brings less of the
    picture's own look along: line-drawing, sepia, inverted, duotone, halftone, embossed, greyscale, black-and-white.
    None is the model's own choice (the embedded base: all of them)."""
    sweep_steps: int | None = Field(default=None, gt=0)
    """Also keep the adapters of every so many steps, and lay them against weights on sweep.png."""
    sweep_weights: Weights = (0.5, 0.75, 1.0)
    """Columns of the sweep."""

    content_config: Path | None = None
    """YAML with more training settings for the content, by the keys of `qrlora train`."""
    style_config: Path | None = None
    """YAML with more training settings for the style."""
    rank: int | None = Field(default=None, gt=0)
    """Of both adapters."""
    basis: str | None = None
    """Of both adapters: qr, svd, minor, random, or lora for plain LoRA."""
    max_train_steps: int | None = Field(default=None, gt=0)
    """Optimiser steps of each training."""
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    train_batch_size: int | None = Field(default=None, gt=0)

    height: int | None = Field(default=None, gt=0)
    """Of the pictures, in pixels."""
    width: int | None = Field(default=None, gt=0)
    num_inference_steps: int | None = Field(default=None, gt=0)
    guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    """As the model's own pipeline means it: distilled guidance (FLUX), or classifier-free guidance (SD3, SDXL)."""
    true_cfg_scale: float | None = Field(default=None, allow_inf_nan=False)
    """Classifier-free guidance on FLUX; 1 is off."""
    negative_prompt: str | None = None
    """What classifier-free guidance guides away from."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for role in ("content", "style"):
            if getattr(self, role) is not None and getattr(self, f"{role}_adapter"):
                raise QrloraError(
                    f"--{role} and --{role}-adapter exclude each other: give a picture to train on, or an adapter."
                )
            if getattr(self, f"{role}_adapter") and getattr(self, f"{role}_config"):
                raise QrloraError(f"--{role}-config says how to train, but --{role}-adapter is trained already.")
        if self.content_looks is not None and self.content_adapter:
            raise QrloraError("--content-looks says how to train, but --content-adapter is trained already; drop one.")
        if self.sweep_steps is not None and self.content_adapter and self.style_adapter:
            raise QrloraError("--sweep-steps needs something to train, but both adapters are given; drop it.")
        for name in ("content_timesteps", "style_timesteps"):
            bounds: tuple[float, float] | None = getattr(self, name)
            if bounds is not None and not 0 <= bounds[0] < bounds[1] <= 1000:
                raise QrloraError(
                    f"--{name.replace('_', '-')} {bounds[0]:g} {bounds[1]:g} is no range of timesteps; give two "
                    "numbers from 0 (clean) to 1000 (pure noise), the lower one first."
                )
        for name in ("content_weights", "style_weights", "sweep_weights"):
            weights: Weights | None = getattr(self, name)
            if weights is None:
                continue
            if not weights:
                raise QrloraError(f"--{name.replace('_', '-')} is empty; give at least one weight.")
            if len(set(weights)) != len(weights):
                raise QrloraError(f"--{name.replace('_', '-')} names a weight twice.")
        for name in ("content_weight", "style_weight", "content_weights", "style_weights", "sweep_weights"):
            value = getattr(self, name)
            if value is None:
                continue
            if not all(math.isfinite(weight) for weight in (value if isinstance(value, tuple) else (value,))):
                raise QrloraError(f"--{name.replace('_', '-')} must be finite, such as 0.9.")
        return self

    def blocks(self, role: Literal["content", "style"]) -> str | None:
        """The part of the network of a role; all of it where None."""
        return self.content_blocks if role == "content" else self.style_blocks

    def timesteps(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest timestep of the roles that have a range."""
        given = {"content": self.content_timesteps, "style": self.style_timesteps}
        return {role: bounds for role, bounds in given.items() if bounds is not None}

    def adapters(self, role: Literal["content", "style"]) -> tuple[Path, ...]:
        """The files given for a role."""
        return self.content_adapter if role == "content" else self.style_adapter
