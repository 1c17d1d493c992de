"""A whole training step over the frozen model's forward and backward."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.performance._flux import RANK, flux_inputs, flux_model
from benchmarks.performance._measure import Times, interleaved
from benchmarks.performance._row import Found, Goal, Row, spread
from benchmarks.performance._steps import FROZEN, OURS, PEFT, SCRIPT, Stepper, calls, stepper, steps
from qrlora import starter
from qrlora.adapter import BasisCache
from qrlora.models import LoadedModel, load_pipeline, read_blueprint
from qrlora.training import TrainConfig, train

WARMUP = 3
AGAINST = "the frozen model's forward + backward"


def _peers(model: LoadedModel, picture: int, batch: int, rank: int, names: tuple[str, ...]) -> dict[str, Stepper]:
    inputs = flux_inputs(model.denoiser, picture, batch, model.defaults.max_sequence_length)
    return {name: stepper(name, model.denoiser, inputs, rank) for name in names}


def train_beside(
    model: LoadedModel, picture: int, batch: int, rank: int, mixed_precision: str, repeats: int, peers: tuple[str, ...]
) -> Times:
    """Steps of `train` itself, everything that a run does between two steps included; peers have a turn after each.

    Args:
        model: trained, and given back as it was.
        picture: pixels of a side.
        batch: pictures a step.
        rank: of all adapters.
        mixed_precision: as the configuration has it.
        repeats: turns that count.
        peers: of `_steps`.
    """
    others = _peers(model, picture, batch, rank, peers)
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, *others)}
    finished = time.perf_counter()

    def on_step(done: int, _: int) -> None:
        nonlocal finished
        taken = {OURS: time.perf_counter() - finished}
        for name, one in others.items():
            start = time.perf_counter()
            one.step()
            taken[name] = time.perf_counter() - start
        if done > WARMUP:
            for name, value in taken.items():
                seconds[name].append(value)
        finished = time.perf_counter()

    sample = starter.samples()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.parse(
            {
                "instance_data_dir": str(sample.content),
                "instance_prompt": sample.content_prompt,
                "output_dir": str(Path(folder) / "run"),
                "resolution": picture,
                "train_batch_size": batch,
                "max_train_steps": WARMUP + repeats,
                "mixed_precision": mixed_precision,
                "adapter.rank": rank,
                "adapter.basis": "random",
            }
        )
        train(config, loaded=model, on_step=on_step, progress=False, cache=BasisCache(Path(folder) / "cache"))
    return Times(seconds)


def embedded(dtype: torch.dtype, width: int = 0, doubles: int = 2, singles: int = 4) -> LoadedModel:
    """The embedded base, or a wider one of random weights in its place."""
    model = load_pipeline(starter.path(), dtype=dtype)
    if width:
        model.pipeline.transformer = flux_model(width, doubles, singles, dtype)
    return model


def measure(quick: bool) -> Found:
    """The embedded base as the demo trains it (fp32, batch 16 of 16 tokens), and one whose matrix products are large
    enough to dominate (bf16, width 1024)."""
    repeats = 3 if quick else 25
    peers = (FROZEN, PEFT, SCRIPT)
    found: dict[str, dict[str, Any]] = {}
    goals = []
    for name, model, setting in (
        ("embedded base, fp32", embedded(torch.float32), (64, 2 if quick else 16, 16, "no")),
        (
            "width 1024, bf16",
            embedded(torch.bfloat16, *((64, 1, 1) if quick else (1024, 2, 4))),
            (64 if quick else 256, 1 if quick else 4, 4 if quick else RANK, "bf16"),
        ),
    ):
        times = train_beside(model, *setting, repeats, peers)
        found[name] = {
            "picture": setting[0],
            "batch": setting[1],
            "rank": setting[2],
            "ratios": times.ratios(FROZEN),
            "seconds": times.medians(),
        }
        goals.append(Goal(name, found[name]["ratios"][OURS], 1.06))
    return _told(found, goals)


def _told(found: dict[str, dict[str, Any]], goals: list[Goal]) -> Found:
    def told(way: str) -> str:
        return spread([one["ratios"][way] for one in found.values()])

    beyond = {name: 1e3 * (one["seconds"][OURS] - one["seconds"][FROZEN]) for name, one in found.items()}
    return Found(
        ", ".join(f"{one['ratios'][OURS]:.2f} ({name})" for name, one in found.items()),
        f"{PEFT} {told(PEFT)}, {SCRIPT} {told(SCRIPT)}",
        tuple(goals),
        "a step is the adapted layers' forward and backward (row `layer`), and drawing, clipping and the optimiser: "
        + ", ".join(f"{value:.0f} ms in all ({name})" for name, value in beyond.items()),
        {"models": found},
    )


def on_gpu(quick: bool) -> Found:
    """FLUX.1-dev at 512 pixels, batch 1, from its public configuration with random weights; eager and compiled."""
    device = torch.device("cuda")
    config: Any = read_blueprint("flux-dev").denoiser.config
    inputs = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")
    sizes = {key: config[key] for key in inputs}
    shape = (256, 1, 1) if quick else (3072, 19, 38)
    base = flux_model(*shape, torch.bfloat16, device, like=sizes)
    ways = steps(base, flux_inputs(base, 512, 1, 512), RANK, (FROZEN, OURS, PEFT, SCRIPT))
    found: dict[str, dict[str, Any]] = {}
    for name in ("FLUX.1-dev, bf16", "FLUX.1-dev, bf16, compiled"):
        times = interleaved(calls(ways), 3 if quick else 10, device=device, warmup=3)
        about = {"picture": 512, "batch": 1, "rank": RANK}
        found[name] = {**about, "ratios": times.ratios(FROZEN), "seconds": times.medians()}
        for one in ways.values():
            one.model.compile()
    return _told(found, [Goal(name, one["ratios"][OURS], 1.06) for name, one in found.items()])


ROWS = [
    Row(
        "step",
        "a whole training step, small FLUX on the CPU",
        AGAINST,
        "at most 1.06",
        measure,
    ),
    Row(
        "step-gpu",
        "the same, FLUX.1-dev on a GPU",
        AGAINST,
        "at most 1.06",
        on_gpu,
        "cuda",
    ),
]
