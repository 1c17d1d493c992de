"""Pictures of the validation prompt while training, with the text encoders already freed."""

import io
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from qrlora.adapter import ALL_TIMESTEPS, TimestepRange, adapters_by_timestep
from qrlora.formats import atomic_write
from qrlora.models import LoadedModel
from qrlora.training.config import TrainConfig
from qrlora.training.setup import ADAPTER_NAME

FOLDER = "validation"
PNG_KEY = "qrlora"


@dataclass(frozen=True)
class Validation:
    """The encoded prompts and where the pictures go."""

    prompt: str
    seeds: list[int]
    conditioning: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None
    resolution: int
    folder: Path
    timesteps: TimestepRange | None = None
    """Where the adapter is trained, and so where it acts; None is everywhere."""
    read_again: bool = False
    """Whether text encoders are trained too, so that prompts mean something new each time."""

    def run(self, model: LoadedModel, step: int, *, keep: bool = True) -> list[Image.Image]:
        """Generate and, with `keep`, save `step-STEP-INDEX.png`; the draws of training are not touched."""
        with self._acting(model):
            pictures, settings = self._drawn(model)
        if keep:
            self._save(model, step, pictures, settings)
        return pictures

    def _acting(self, model: LoadedModel) -> AbstractContextManager[None]:
        if self.timesteps is None:
            return nullcontext()
        given = partial(model.family.given_timesteps, model.pipeline)
        return adapters_by_timestep(model.denoiser, {ADAPTER_NAME: 1.0}, {ADAPTER_NAME: self.timesteps}, given)

    def _read(self, model: LoadedModel) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]:
        """What the prompts mean now."""
        if not self.read_again:
            return self.conditioning, self.negative
        family, pipeline, negative = model.family, model.pipeline, self.negative
        with torch.no_grad():
            if negative is not None:
                negative = family.encode_negative_again(pipeline, model.defaults.negative_prompt, negative)
            return family.encode_again(pipeline, [self.prompt], self.conditioning), negative

    def _drawn(self, model: LoadedModel) -> tuple[list[Image.Image], dict[str, Any]]:
        conditioning, negative = self._read(model)
        rows = {key: value.expand(len(self.seeds), *value.shape[1:]) for key, value in conditioning.items()}
        settings: dict[str, Any] = model.defaults.model_dump()
        settings |= {"height": self.resolution, "width": self.resolution}
        pictures = model.family.generate(
            model.pipeline,
            [self.prompt] * len(self.seeds),
            seeds=self.seeds,
            conditioning=rows,
            negative_conditioning=negative,
            **settings,
        )
        return pictures, settings

    def _save(self, model: LoadedModel, step: int, pictures: list[Image.Image], settings: dict[str, Any]) -> None:
        for index, (picture, seed) in enumerate(zip(pictures, self.seeds, strict=True)):
            text = PngInfo()
            about = {"prompt": self.prompt, "seed": seed, "step": step, "model": model.model_id, "settings": settings}
            if self.timesteps is not None:
                about["timesteps"] = self.timesteps
            text.add_itxt(PNG_KEY, json.dumps(about, ensure_ascii=False))
            content = io.BytesIO()
            picture.save(content, "PNG", pnginfo=text)
            atomic_write(self.folder / f"step-{step:06d}-{index}.png", content.getvalue())


def prepare_validation(config: TrainConfig, model: LoadedModel, output: Path) -> Validation | None:
    """Encode the validation prompt while the encoders are there; None without one."""
    if config.validation_prompt is None or config.resolution is None:
        return None
    length, defaults = model.defaults.max_sequence_length, model.defaults
    bounds = (config.min_timestep, config.max_timestep)
    negative = None
    if model.family.uses_negative(defaults):
        negative = model.family.encode_negative(model.pipeline, defaults.negative_prompt, length)
    return Validation(
        prompt=config.validation_prompt,
        seeds=[config.seed + index for index in range(config.num_validation_images)],
        conditioning=model.family.encode_prompts(model.pipeline, [config.validation_prompt], length),
        negative=negative,
        resolution=config.resolution,
        folder=output / FOLDER,
        timesteps=None if bounds == ALL_TIMESTEPS else bounds,
        read_again=config.train_text_encoder,
    )


def last_pictures(config: TrainConfig) -> list[str]:
    """Those of a finished run's last step, relative to its folder; none without a validation prompt."""
    output = Path(config.output_dir)
    found = (output / FOLDER).glob(f"step-{config.max_train_steps:06d}-*.png") if config.validation_prompt else ()
    return [path.relative_to(output).as_posix() for path in sorted(found)]


def log_pictures(trackers: list[Any], pictures: list[Image.Image], step: int) -> None:
    """Hand pictures to the trackers that take them."""
    arrays = [np.asarray(picture) for picture in pictures]
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({FOLDER: np.stack(arrays)}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({FOLDER: arrays}, step=step)
