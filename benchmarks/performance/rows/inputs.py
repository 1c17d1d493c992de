"""What a training step waits for its data: drawing a batch, and taking its rows from what was encoded before."""

import tempfile
from pathlib import Path

import torch

from benchmarks.performance._measure import MIB, interleaved
from benchmarks.performance._row import Found, Goal, Row
from benchmarks.performance.rows.step import train_beside
from qrlora import starter
from qrlora.data import Encoded, Group
from qrlora.models import LoadedModel, load_pipeline
from qrlora.training import TrainConfig
from qrlora.training.objective import draw, inputs_of
from qrlora.training.pictures import encode, find_sources

BATCH = 16
OURS, ENCODING = "qrlora", "encoding the batch's pictures at the step"
# FLUX.1-dev at 1024 pixels: latents, T5 and pooled CLIP embeddings; a hundred pictures of one caption each.
FLUX_LATENTS, FLUX_TEXTS, FLUX_PICTURES, FLUX_BATCH = (16, 128, 128), (512, 4096), 100, 4


def measure(quick: bool) -> Found:
    """On the embedded base as the row `step` trains it, and on a cache of FLUX.1-dev's sizes."""
    repeats = 3 if quick else 25
    batch = 2 if quick else BATCH
    model = load_pipeline(starter.path(), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(batch, Path(folder))
        encoded = encode(config, model, find_sources(config), torch.device("cpu"))
    process = model.family.noise_process(model.pipeline)
    pictures = torch.rand(batch, 3, 64, 64) * 2 - 1
    steps = iter(range(10**6))

    def take(cache: Encoded, told: TrainConfig) -> None:
        inputs_of(cache, draw(told, cache, process, next(steps), 0))

    times = interleaved(
        {
            OURS: lambda: take(encoded, config),
            ENCODING: lambda: model.family.encode_pictures(model.pipeline, pictures),
        },
        repeats,
    )
    large, told = _flux_cache(quick), config.model_copy(update={"train_batch_size": FLUX_BATCH})
    of_flux = interleaved({OURS: lambda: take(large, told)}, repeats).median(OURS)
    step = _step(model, batch, repeats)
    share = times.median(OURS) / step
    return Found(
        f"{1e3 * times.median(OURS):.2f} ms of a step of {1e3 * step:.0f} ms; {1e3 * of_flux:.0f} ms for a batch of "
        f"{FLUX_BATCH} of FLUX.1-dev at 1024 pixels",
        f"{ENCODING} {1e3 * times.median(ENCODING):.0f} ms",
        (Goal("share of a step", round(share, 5), 0.01),),
        f"a batch of FLUX.1-dev is {_moved(large, FLUX_BATCH) / MIB:.0f} MiB, copied once, and its noise drawn",
        {"batch": batch, "seconds": times.medians(), "step_seconds": step, "flux_seconds": of_flux, "share": share},
    )


def _config(batch: int, folder: Path) -> TrainConfig:
    sample = starter.samples()
    return TrainConfig.parse(
        {
            "instance_data_dir": str(sample.content),
            "instance_prompt": sample.content_prompt,
            "output_dir": str(folder / "run"),
            "resolution": 64,
            "train_batch_size": batch,
            "max_train_steps": 1,
        }
    )


def _step(model: LoadedModel, batch: int, repeats: int) -> float:
    """Seconds of a whole step of `train` on the embedded base."""
    return train_beside(model, 64, batch, 16, "no", repeats, ()).median(OURS)


def _moved(cache: Encoded, batch: int) -> int:
    """Bytes of a batch's latents, noise and texts."""
    latents = cache.groups[0].latents[0].nbytes
    return batch * (2 * latents + sum(rows[0].nbytes for rows in cache.conditioning.values()))


def _flux_cache(quick: bool) -> Encoded:
    count = 2 if quick else FLUX_PICTURES
    group = Group(torch.randn(count, *FLUX_LATENTS), None, torch.arange(count))
    texts = {
        "prompt_embeds": torch.zeros(count, *FLUX_TEXTS, dtype=torch.bfloat16),
        "pooled_prompt_embeds": torch.zeros(count, 768, dtype=torch.bfloat16),
    }
    return Encoded((group,), texts, "")


ROWS = [Row("inputs", "a step's data: drawn, and taken from the cache", "the step", "at most 1 % of it", measure)]
