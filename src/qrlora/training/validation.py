"""Pictures of the validation prompt while training, with the text encoders already freed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from qrlora.models import LoadedModel
from qrlora.training.config import TrainConfig

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

    def run(self, model: LoadedModel, step: int) -> list[Image.Image]:
        """Generate and save `step-STEP-INDEX.png`; the draws of training are not touched."""
        rows = {key: value.expand(len(self.seeds), *value.shape[1:]) for key, value in self.conditioning.items()}
        settings: dict[str, Any] = model.defaults.model_dump()
        settings |= {"height": self.resolution, "width": self.resolution}
        pictures = model.family.generate(
            model.pipeline,
            [self.prompt] * len(self.seeds),
            seeds=self.seeds,
            conditioning=rows,
            negative_conditioning=self.negative,
            **settings,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, (picture, seed) in enumerate(zip(pictures, self.seeds, strict=True)):
            text = PngInfo()
            about = {"prompt": self.prompt, "seed": seed, "step": step, "model": model.model_id, "settings": settings}
            text.add_itxt(PNG_KEY, json.dumps(about, ensure_ascii=False))
            picture.save(self.folder / f"step-{step:06d}-{index}.png", pnginfo=text)
        return pictures


def prepare_validation(config: TrainConfig, model: LoadedModel, output: Path) -> Validation | None:
    """Encode the validation prompt while the encoders are there; None without one."""
    if config.validation_prompt is None or config.resolution is None:
        return None
    length, defaults = model.defaults.max_sequence_length, model.defaults
    negative = None
    if defaults.true_cfg_scale > 1:
        negative = model.family.encode_prompts(model.pipeline, [defaults.negative_prompt], length)
    return Validation(
        prompt=config.validation_prompt,
        seeds=[config.seed + index for index in range(config.num_validation_images)],
        conditioning=model.family.encode_prompts(model.pipeline, [config.validation_prompt], length),
        negative=negative,
        resolution=config.resolution,
        folder=output / FOLDER,
    )


def log_pictures(trackers: list[Any], pictures: list[Image.Image], step: int) -> None:
    """Hand pictures to the trackers that take them."""
    arrays = [np.asarray(picture) for picture in pictures]
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({FOLDER: np.stack(arrays)}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({FOLDER: arrays}, step=step)
