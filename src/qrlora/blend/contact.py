"""The contact sheet of a series of trainings: what each learned from, and what its adapter draws."""

from collections.abc import Sequence
from pathlib import Path

from qrlora.adapter import ALL_TIMESTEPS, TimestepRange
from qrlora.blend.painter import Painter
from qrlora.blend.provenance import has_chunk, save_picture
from qrlora.blend.sheet import Cell, draw_sheet
from qrlora.errors import QrloraError
from qrlora.models import LoadedModel
from qrlora.training.config import TrainConfig
from qrlora.training.series import CONTACT, PICTURES, Job, Series
from qrlora.training.train_many import JobResult

_PAIRS = 3
_NAME = "drawn"


def check_contact(series: Series) -> None:
    """Refuse to write over pictures that are not ours.

    Raises:
        QrloraError: as said.
    """
    for path in (series.output / CONTACT, *(_picture_of(series, job) for job in series.jobs)):
        if path.exists() and not has_chunk(path):
            raise QrloraError(f"{path} was not made by qrlora and stays; move it, or name another output_dir.")


def draw_contact(series: Series, results: Sequence[JobResult], model: LoadedModel) -> Path:
    """Draw with each adapter, at its training's seed and timesteps, and lay the pictures out.

    The prompt is the job's `validation_prompt`, or its first caption. Every picture is kept by itself under `pictures`,
    repeatable with `qrlora generate --from`.

    Args:
        series: the jobs.
        results: one a job, in their order.
        model: without adapters, and given back so.

    Returns:
        The sheet.
    """
    painter = Painter(model, series.jobs[0].config.model, model.defaults)
    cells = [
        cell for job, result in zip(series.jobs, results, strict=True) for cell in _pair(series, job, result, painter)
    ]
    rows = [cells[start : start + 2 * _PAIRS] for start in range(0, len(cells), 2 * _PAIRS)]
    done = [result for result in results if result.adapter is not None]
    sheet = draw_sheet(f"{len(done)} of {len(results)} adapters", model.model_id, rows, [])
    path = series.output / CONTACT
    uses = [(Path(result.adapter), 1.0) for result in done if result.adapter is not None]
    made = [f"{PICTURES}/{result.name}.png" for result in done]
    ranges = {
        Path(result.adapter): bounds
        for job, result in zip(series.jobs, results, strict=True)
        if result.adapter is not None and (bounds := _timesteps(_settled(job, model))) != ALL_TIMESTEPS
    }
    about = painter.sheet_provenance(path, "", series.jobs[0].config.seed, uses, made, ranges)
    return save_picture(sheet, path, about)


def _pair(series: Series, job: Job, result: JobResult, painter: Painter) -> tuple[Cell, Cell]:
    source = job.sources[0]
    learned = Cell(source.read().rgb, job.name, source.caption)
    if result.adapter is None:
        return learned, Cell(None, "failed", result.error or "")
    config = _settled(job, painter.loaded)
    prompt = config.validation_prompt or source.caption
    painter.attach(_NAME, Path(result.adapter))
    try:
        picture = painter.paint(prompt, config.seed, {_NAME: 1.0}, {_NAME: _timesteps(config)})
        painter.save(picture, _picture_of(series, job))
    finally:
        painter.detach(_NAME)
    return learned, Cell(picture.image, f"{result.steps} steps", f'"{prompt}"')


def _settled(job: Job, model: LoadedModel) -> TrainConfig:
    return job.config.with_defaults(model.training)


def _timesteps(config: TrainConfig) -> TimestepRange:
    """Where the adapter was trained, and so where it acts."""
    return config.min_timestep, config.max_timestep


def _picture_of(series: Series, job: Job) -> Path:
    return series.output / PICTURES / f"{job.name}.png"
