"""A series of trainings on one loaded model: each is the training that it would be alone."""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qrlora import starter
from qrlora.adapter import BasisCache
from qrlora.errors import QrloraError
from qrlora.formats import atomic_write
from qrlora.models import LoadedModel, load_pipeline, read_settings
from qrlora.training.loop import TrainResult, train
from qrlora.training.memory import enough_to, with_preset
from qrlora.training.processes import join_launch
from qrlora.training.series import SUMMARY, Job, Series
from qrlora.training.setup import choose_device, choose_precision

Status = Literal["trained", "was done", "failed"]
_MARK = "qrlora train-many"
_BUGS = (  # ours, or a library's
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class JobResult:
    """How one job ended.

    Attributes:
        name: of the job.
        status: "was done" where an earlier call had finished it.
        adapter: the file; None where it failed.
        steps: optimiser steps, those of earlier calls too.
        loss: mean of the last 20 steps.
        seconds: of this call.
        error: what was told; None where nothing was wrong.
    """

    name: str
    status: Status
    adapter: str | None = None
    steps: int = 0
    loss: float | None = None
    seconds: float = 0.0
    error: str | None = None


class JobsFailed(Exception):
    """Some jobs of a series failed; the others are done.

    Attributes:
        exit_code: 1.
    """

    exit_code = 1

    def __init__(self, results: Sequence[JobResult], summary: Path) -> None:
        failed = [result.name for result in results if result.status == "failed"]
        super().__init__(
            f"{len(failed)} of {len(results)} jobs failed ({', '.join(failed)}); {summary} says why. The others are "
            "done, and the same command trains those that failed again."
        )


def check_summary(output: Path) -> None:
    """Refuse a folder that is a file, and to write over a summary that is not ours.

    Raises:
        QrloraError: as said.
    """
    if output.exists() and not output.is_dir():
        raise QrloraError(f"output_dir: {output} is a file; name a folder.")
    path = output / SUMMARY
    if not path.exists():
        return
    try:
        ours = json.loads(path.read_text(encoding="utf-8"))["made_by"] == _MARK
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise QrloraError(
            f"{path} was not written by qrlora train-many and stays; move it, or name another output_dir."
        )


def load_for_series(series: Series) -> LoadedModel:
    """The one model of all jobs, whole, as a training would have loaded it.

    Between jobs its text encoders wait in the CPU's memory.

    Raises:
        QrloraError: no such model, too little memory for it, or several processes.
    """
    config = series.jobs[0].config
    accelerator = join_launch(config.device)
    if accelerator.num_processes > 1:
        raise QrloraError(
            f"train-many trains in one process, and there are {accelerator.num_processes}; give each device a list of "
            "its own, or launch qrlora train."
        )
    device, source = choose_device(config, None, accelerator), config.model or str(starter.path())
    precision = choose_precision(config, read_settings(source).training, device)
    model = load_pipeline(source, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, denoiser=False)
    config = config.with_defaults(with_preset(config, model))
    streamed = "blocks" if config.memory not in (None, "max") else config.encoder_offload
    model.keep_as(config.quantization, config.offload, streamed)
    model.park_encoders = True
    with enough_to("load the model", config.memory):
        model.place_encoders(device)
        model.load_denoiser(device)
    return model


def train_series(
    series: Series,
    model: LoadedModel,
    *,
    progress: bool = True,
    cache: BasisCache | None = None,
    on_job: Callable[[int, Job], None] | None = None,
) -> list[JobResult]:
    """Train what is not done yet; a job that fails leaves the others alone.

    After each job, `summary.json` is written anew.

    Args:
        series: checked by `check_on_model`.
        model: from `load_for_series`, given back without adapters.
        progress: show each training's progress on standard error.
        cache: of bases; the default one where None.
        on_job: called before each job with its number, from 1.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the job was saved, and the same call goes on with it.
    """
    results: list[JobResult] = []
    for number, job in enumerate(series.jobs, start=1):
        if on_job is not None:
            on_job(number, job)
        results.append(_trained(job, model, progress, cache))
        _write_summary(series.output, results, len(series.jobs))
    return results


def _trained(job: Job, model: LoadedModel, progress: bool, cache: BasisCache | None) -> JobResult:
    try:
        return _told(job.name, train(job.config, loaded=model, progress=progress, cache=cache))
    except QrloraError as error:
        return JobResult(job.name, "failed", error=str(error))
    except _BUGS as error:
        # Told in full, but hours of other trainings are not to be lost over it.
        traceback.print_exc(file=sys.stderr)
        return JobResult(job.name, "failed", error=f"{type(error).__name__}: {error}")


def _told(name: str, result: TrainResult) -> JobResult:
    last = result.losses[-20:]
    return JobResult(
        name,
        "trained" if "train" in result.phases else "was done",
        adapter=str(result.path),
        steps=len(result.losses),
        loss=sum(last) / len(last),
        seconds=result.seconds,
    )


def _write_summary(output: Path, results: Sequence[JobResult], jobs: int) -> None:
    found: dict[str, Any] = {"made_by": _MARK, "jobs": jobs, "results": [asdict(result) for result in results]}
    atomic_write(output / SUMMARY, json.dumps(found, indent=1))
