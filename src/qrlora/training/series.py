"""Many trainings of one model, one after another: what they are, read and checked before any of them begins."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qrlora.adapter import base_hash, check_addable
from qrlora.data import Source
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import read_adapter, read_metadata
from qrlora.models import LoadedModel
from qrlora.training.checkpoint import checkpoint_folders
from qrlora.training.config import TrainConfig
from qrlora.training.folder import RESULT, find_start
from qrlora.training.keys import nest, overlay
from qrlora.training.objective import check_levels
from qrlora.training.optimiser import check_packages
from qrlora.training.pictures import find_sources
from qrlora.training.prior import check_class_folder
from qrlora.training.record import check_same_run, record_of
from qrlora.training.setup import load_model
from qrlora.training.split import split_of
from qrlora.training.words import check_initial

SUMMARY, CONTACT, PICTURES = "summary.json", "contact.png", "pictures"
"""Written beside the jobs' folders."""
OF_THE_MODEL = ("model", "device", "memory", "quantization", "offload", "encoder_offload", "mixed_precision")
"""Told once for all jobs, which share the loaded model."""
_NEVER = {
    "output_dir": "a job's folder is that of the series, and its name",
    "resume": "a job goes on by itself where it stopped",
    "overwrite": "remove a job's folder to train it anew",
}


class _Entry(BaseModel):
    """One of `jobs`, with keys of `TrainConfig` beside its name."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)


class _File(BaseModel):
    """The whole file, with keys of `TrainConfig` that all jobs share."""

    model_config = ConfigDict(frozen=True, extra="allow")

    output_dir: str
    jobs: list[_Entry] = Field(min_length=1)


@dataclass(frozen=True)
class Job:
    """One training of a series.

    Attributes:
        name: of its folder.
        config: with `resume` set where there is something to go on from.
        sources: its pictures.
    """

    name: str
    config: TrainConfig
    sources: list[Source]


@dataclass(frozen=True)
class Series:
    """Many trainings of one model, their folders beside each other in `output`."""

    output: Path
    jobs: list[Job]


def read_series(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Series:
    """Read a YAML file of settings that all jobs share and `jobs`, a list with each one's own and its `name`.

    All pictures are read once, so that a broken one is told before anything is trained.

    Args:
        path: of the file.
        overrides: settings (dotted keys) that win over it in every job.

    Raises:
        QrloraError: the first problem, with the name of the job that has it.
    """
    values = nest(_read(Path(path)))
    above = nest(overrides or {})
    if "output_dir" in above:
        values["output_dir"] = above.pop("output_dir")
    file = _validated(values, str(path))
    shared = overlay(file.model_extra or {}, above)
    _refuse(shared, {key: _NEVER[key] for key in ("resume", "overwrite")}, str(path))
    if "hub_model_id" in shared:
        raise QrloraError(f"{path}: hub_model_id would be one repository for all jobs; set it in each job.")
    _check_names([entry.name for entry in file.jobs], str(path))
    return Series(
        Path(file.output_dir), [_job(entry, file.output_dir, shared, above, str(path)) for entry in file.jobs]
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QrloraError(f"the jobs {path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QrloraError(f"the jobs {path} are not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise QrloraError(f"{path} must be a mapping of settings, with jobs: a list of mappings.")
    return values


def _validated(values: Mapping[str, Any], path: str) -> _File:
    try:
        return _File.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        job = problem["loc"][1] if len(problem["loc"]) > 1 else None
        which = f" (job number {job + 1})" if isinstance(job, int) else ""
        raise QrloraError(f"{path}: {where}{which} is not valid: {problem['msg']}.") from error


def _refuse(values: Mapping[str, Any], refused: Mapping[str, str], source: str) -> None:
    for key, why in refused.items():
        if key in values:
            raise QrloraError(f"{source}: {key} cannot be set here: {why}.")


def _check_names(names: list[str], path: str) -> None:
    """Each has a folder of its own, also where a file system does not tell cases apart."""
    taken = dict.fromkeys(map(str, (SUMMARY, CONTACT, PICTURES)), "what all jobs make together")
    for name in names:
        if name.lower() in taken:
            raise QrloraError(
                f"{path}: job {name} would write where {taken[name.lower()]} is written; give it another name."
            )
        taken[name.lower()] = f"job {name}"


def _job(entry: _Entry, output: str, shared: Mapping[str, Any], above: Mapping[str, Any], path: str) -> Job:
    source = f"{path}: job {entry.name}"
    own = nest(entry.model_extra or {})
    together = "all jobs share one model; set it above the list of jobs"
    _refuse(own, {**_NEVER, **dict.fromkeys(OF_THE_MODEL, together)}, source)
    folder = Path(output) / entry.name
    begun = (folder / RESULT).exists() or bool(checkpoint_folders(folder))
    where = {"output_dir": str(folder), "resume": "latest" if begun else None}
    try:
        config = TrainConfig.parse(overlay(overlay(shared, own), above) | where, source)
        return Job(entry.name, config, _checked(config))
    except QrloraError as error:
        text = str(error)
        raise QrloraError(text if text.startswith(source) else f"{source}: {text}") from error


def _checked(config: TrainConfig) -> list[Source]:
    """What can be known of a training without its model."""
    find_start(config)
    check_packages(config)
    check_class_folder(config)
    if config.init_from is not None:
        check_initial(config, read_adapter(config.init_from))
    sources = find_sources(config)
    for source in sources:
        source.read()
    return sources


def check_on_model(series: Series, model: LoadedModel) -> None:
    """Refuse jobs that the model cannot train, or whose folders hold another run, before any of them begins.

    Raises:
        QrloraError: the first problem, with the name of the job that has it.
    """
    for job in series.jobs:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", QrloraWarning)  # told when the job is trained
                _check_on_model(job.config, model)
        except QrloraError as error:
            raise QrloraError(f"job {job.name}: {error}") from error


def _check_on_model(given: TrainConfig, model: LoadedModel) -> None:
    _, config = load_model(given, model, model.device)
    check_levels(config, model.family.noise_process(model.pipeline))
    layers = check_addable(model.denoiser, config.adapter)
    then = _record_of_folder(config)
    if then is None:
        return
    now = record_of(
        split_of(config, 0, 1).config,
        data=then["data"],  # known once the pictures are encoded
        class_data=then.get("class_data"),
        base=base_hash(model.denoiser, layers),
    )
    try:
        check_same_run(now, then, config.output_dir)
    except QrloraError as error:
        raise QrloraError(f"{error} In a series, remove its folder to train it anew.") from error


def _record_of_folder(config: TrainConfig) -> Mapping[str, Any] | None:
    """Of the run that the job's folder holds, if any."""
    start, result = find_start(config), Path(config.output_dir) / RESULT
    if start is not None:
        return start.record
    if not result.exists():
        return None
    try:
        return json.loads(read_metadata(result)["qrlora"])["training"]["record"]
    except (KeyError, TypeError, ValueError) as error:
        raise QrloraError(f"{result} is not the result of a training run; move it away.") from error
