"""Prior preservation (DreamBooth, arXiv 2208.12242): class pictures, drawn by the base where they are missing."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from qrlora.adapter import pipeline_adapters_disabled
from qrlora.data import (
    Encoded,
    Framing,
    Source,
    class_sources,
    encode_examples,
    encode_texts,
    frame,
    nearest_size,
    picture_files,
    pictures_in,
)
from qrlora.errors import QrloraError
from qrlora.formats import atomic_write
from qrlora.models import LoadedModel
from qrlora.training.config import TrainConfig
from qrlora.training.pictures import sizes_of
from qrlora.training.progress import ProgressReport
from qrlora.training.setup import Place
from qrlora.training.validation import PNG_KEY

_HALF_WRITTEN = re.compile(r"\.class-\d+\.png\.[0-9a-f]+\.tmp")


@dataclass(frozen=True)
class Prior:
    """What class pictures are drawn and trained with once the text encoders are gone.

    `texts` is the conditioning of the class prompt, `negative` what pictures are guided away from.
    """

    config: TrainConfig
    texts: dict[str, dict[str, Tensor]]
    negative: Mapping[str, Tensor] | None

    def encode(self, model: LoadedModel, accelerator: Accelerator, place: Place, *, progress: bool) -> Encoded:
        """Draw what is missing with the base alone, then encode all; the denoiser and autoencoder are needed."""
        missing = _missing(self.config)
        if missing and place.main:
            _clear_leftovers(_folder(self.config))
        accelerator.wait_for_everyone()  # all count before one draws
        if missing and place.sharded:
            raise QrloraError(
                f"class_data_dir: {len(missing)} class pictures are missing, and a base that is to be shared out "
                "(FSDP) does not draw them; draw them first by starting this training in one process."
            )
        if missing:
            self._draw(model, place, missing[place.process :: place.processes], progress=progress)
        accelerator.wait_for_everyone()
        framing = Framing(sizes_of(self.config, model))
        return encode_examples(
            frame(_chosen(self.config), framing),
            model.family,
            model.pipeline,
            max_sequence_length=model.defaults.max_sequence_length,
            use_masks=self.config.mask_loss,
            texts=self.texts,
        )

    def _draw(self, model: LoadedModel, place: Place, numbers: list[int], *, progress: bool) -> None:
        """One picture a number, each from a seed of its own and written at once, so that an interrupt loses one."""
        config, folder = self.config, _folder(self.config)
        height, width = nearest_size((1, 1), sizes_of(config, model))
        settings: dict[str, Any] = model.defaults.model_dump() | {"height": height, "width": width}
        text = self.texts[_prompt(config)]
        with (
            pipeline_adapters_disabled(model.pipeline),
            torch.autocast(place.device.type, torch.bfloat16, enabled=place.autocast),
            ProgressReport("class pictures", len(numbers), shown=progress) as report,
        ):
            for done, number in enumerate(numbers, start=1):
                seed = config.seed + number
                (picture,) = model.family.generate(
                    model.pipeline,
                    [_prompt(config)],
                    seeds=[seed],
                    conditioning=text,
                    negative_conditioning=self.negative,
                    **settings,
                )
                # as a validation picture has it; at step 0 there is the base alone
                about = {"prompt": _prompt(config), "seed": seed, "step": 0, "model": model.model_id}
                about["settings"] = settings
                atomic_write(folder / _name(number), _png(picture, about))
                if report.due(done):
                    report.show(done)


def prepare_prior(config: TrainConfig, model: LoadedModel) -> Prior | None:
    """Encode the class prompt while the text encoders are there; None without prior preservation."""
    if not config.with_prior_preservation:
        return None
    length, negative = model.defaults.max_sequence_length, None
    if model.family.uses_negative(model.defaults):
        negative = model.family.encode_negative(model.pipeline, model.defaults.negative_prompt, length)
    return Prior(config, encode_texts([_prompt(config)], model.family, model.pipeline, length), negative)


def check_class_folder(config: TrainConfig) -> None:
    """Refuse a folder that cannot be the class pictures', before a large model is loaded.

    Raises:
        QrloraError: a file, stray masks, or pictures that this program drew for another prompt.
    """
    if not config.with_prior_preservation:
        return
    folder = _folder(config)
    if folder.exists() and not folder.is_dir():
        raise QrloraError(f"class_data_dir: {folder} is a file; name a folder.")
    if not _missing(config):
        picture_files(folder, "class_data_dir")
    for path in pictures_in(folder) if folder.is_dir() else []:
        drawn = _prompt_of(path)
        if drawn is not None and drawn != _prompt(config):
            raise QrloraError(
                f"class_data_dir: {path} was drawn for class_prompt={drawn!r}, not for {_prompt(config)!r}; name "
                "another folder, or remove those pictures."
            )


def _clear_leftovers(folder: Path) -> None:
    """Remove what a killed run left half-written, before any process writes."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _HALF_WRITTEN.fullmatch(path.name):
            path.unlink()


def _missing(config: TrainConfig) -> list[int]:
    """Numbers of the pictures still to be drawn: as many as the folder lacks, whatever the names there."""
    folder = _folder(config)
    there = {path.name for path in pictures_in(folder)} if folder.is_dir() else set()
    free = (number for number in range(len(there) + config.num_class_images) if _name(number) not in there)
    return [number for number, _ in zip(free, range(config.num_class_images - len(there)), strict=False)]


def _chosen(config: TrainConfig) -> list[Source]:
    assert config.class_data_dir is not None
    return class_sources(config.class_data_dir, _prompt(config))[: config.num_class_images]


def _folder(config: TrainConfig) -> Path:
    assert config.class_data_dir is not None
    return Path(config.class_data_dir)


def _prompt(config: TrainConfig) -> str:
    assert config.class_prompt is not None
    return config.class_prompt.strip()


def _name(number: int) -> str:
    return f"class-{number:05d}.png"


def _prompt_of(path: Path) -> str | None:
    """What a picture of ours was drawn for; None for other pictures."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            about = json.loads(picture.info[PNG_KEY])
        return str(about["prompt"])
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):
        return None  # not ours; whether it is a picture at all is told when it is read


def _png(picture: Image.Image, about: Mapping[str, Any]) -> bytes:
    text, stream = PngInfo(), io.BytesIO()
    text.add_itxt(PNG_KEY, json.dumps(about, ensure_ascii=False))
    picture.save(stream, "PNG", pnginfo=text)
    return stream.getvalue()
