"""The pictures of a run: where they are, the sizes they are cut to, and the cache made of them."""

import re

import torch

from qrlora.data import (
    Encoded,
    Framing,
    Source,
    dataset_sources,
    encode_examples,
    folder_sources,
    frame,
    in_looks,
    training_sizes,
)
from qrlora.models import LoadedModel
from qrlora.training.config import TrainConfig
from qrlora.training.progress import ProgressReport

_TRIGGER = re.compile(r"<[^<>\s]+>")


def find_sources(config: TrainConfig) -> list[Source]:
    """The instance pictures and their captions, in all looks, no picture read yet."""
    if config.dataset_name is None:
        assert config.instance_data_dir is not None
        sources = folder_sources(config.instance_data_dir, config.instance_prompt)
    else:
        sources = dataset_sources(
            config.dataset_name,
            config.instance_prompt,
            config_name=config.dataset_config_name,
            image_column=config.image_column,
            caption_column=config.caption_column,
        )
    return in_looks(sources, config.looks)


def sizes_of(config: TrainConfig, model: LoadedModel) -> tuple[tuple[int, int], ...]:
    """Heights and widths that are trained on.

    Raises:
        QrloraError: a bucket that the model cannot have.
    """
    assert config.resolution is not None
    multiple = model.family.latent_multiple(model.pipeline)
    return training_sizes(config.aspect_ratio_buckets, config.resolution, multiple)


def encode(
    config: TrainConfig, model: LoadedModel, sources: list[Source], device: torch.device, *, progress: bool = False
) -> Encoded:
    """The cached inputs, with the encoders moved to `device` for the purpose."""
    model.place_encoders(device)
    framing = Framing(sizes_of(config, model), 0 if config.center_crop else config.random_crops, config.seed)
    with ProgressReport("encode", len(sources), shown=progress and len(sources) > 8) as report:
        return encode_examples(
            frame(sources, framing),
            model.family,
            model.pipeline,
            max_sequence_length=model.defaults.max_sequence_length,
            crops=framing.count,
            random_flip=config.random_flip,
            use_masks=config.mask_loss,
            on_picture=report.show_if_slow,
        )


def trigger_words(sources: list[Source]) -> list[str]:
    """The `<...>` tokens of the captions, in order of appearance."""
    return list(dict.fromkeys(word for source in sources for word in _TRIGGER.findall(source.caption)))


def captions_of(sources: list[Source], limit: int = 20) -> list[str]:
    """The first distinct captions, for the result's header."""
    return list(dict.fromkeys(source.caption for source in sources))[:limit]
