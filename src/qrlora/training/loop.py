"""One training loop for every family."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from qrlora.adapter import BasisCache, adapter_of, base_hash, target_layers, trained_size
from qrlora.data import load_examples, picture_files
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter
from qrlora.models import LoadedModel
from qrlora.training.checkpoint import Checkpoint
from qrlora.training.config import TrainConfig
from qrlora.training.folder import (
    LOSSES,
    RESULT,
    find_start,
    finished_losses,
    outdated_by,
    prepare_folder,
    write_losses,
)
from qrlora.training.interrupt import graceful_stop
from qrlora.training.optimiser import make_optimiser
from qrlora.training.progress import ProgressReport
from qrlora.training.record import ORIGIN, check_same_run, record_of
from qrlora.training.run import OnStep, Run
from qrlora.training.setup import (
    ADAPTER_NAME,
    Place,
    borrowed,
    captions_of,
    choose_device,
    encode,
    file_hash,
    load_model,
    prepare_adapter,
    restore,
    trigger_words,
)
from qrlora.training.trackers import Trackers
from qrlora.training.validation import prepare_validation


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        path: the adapter file.
        losses: mean loss of each optimiser step, from step 0 also where the run was resumed.
        seconds: of this call, from its start.
        phases: seconds by phase of this call: load, encode, adapter, train.
        parameters: how many numbers are trained, without masked ones.
        config: the configuration with nothing left open.
    """

    path: Path
    losses: list[float]
    seconds: float
    phases: dict[str, float]
    parameters: int
    config: TrainConfig


def train(
    config: TrainConfig,
    *,
    loaded: LoadedModel | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
    cache: BasisCache | None = None,
) -> TrainResult:
    """Train one adapter and write it to `output_dir/adapter.safetensors`.

    Beside it land `config.yaml` (fully resolved), `losses.json`, and `checkpoint-STEP` folders, each with an adapter of
    its own. With `resume`, the result is the one an uninterrupted run would have given, bit for bit on one machine's
    CPU.

    Args:
        config: what to train.
        loaded: a model to train on, given back as it was found; loaded from `config.model` where None.
        on_step: called after each optimiser step with (steps done, steps in all).
        progress: show progress on standard error.
        cache: of bases; the default one where None.

    Raises:
        QrloraError: bad input, an `output_dir` that holds another run, a resumed run that would be another run, or a
            loss that is not finite.
        Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
    """
    started = time.perf_counter()
    start = find_start(config)
    picture_files(config.instance_data_dir)  # a wrong path is told before a large model is loaded
    if config.init_from is not None:
        read_adapter(config.init_from)  # and so is a wrong adapter
    # Buffers are constant here; some forms keep large ones.
    constant = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[constant])
    device = choose_device(config, loaded, accelerator)
    model, config = load_model(config, loaded, device, start)
    place = Place(device, config.mixed_precision == "bf16", accelerator.process_index, accelerator.num_processes)
    clock = _Clock(started)
    clock.done("load")
    with borrowed(model, give_back=loaded is not None):
        run = _prepare(config, model, accelerator, place, start, clock, progress=progress and place.main, cache=cache)
        if isinstance(run, TrainResult):
            return run
        try:
            with (
                run.casting(),
                graceful_stop() as stop,
                ProgressReport("train", config.max_train_steps, done=run.step, shown=progress and place.main) as report,
            ):
                while run.step < config.max_train_steps:
                    run.train_step()
                    run.after_step(report, stop, on_step)
        finally:
            run.trackers.close()
        return _finish(run, clock)


def _prepare(
    config: TrainConfig,
    model: LoadedModel,
    accelerator: Accelerator,
    place: Place,
    start: Checkpoint | None,
    clock: "_Clock",
    *,
    progress: bool,
    cache: BasisCache | None,
) -> "Run | TrainResult":
    assert config.resolution is not None
    examples = load_examples(config.instance_data_dir, config.instance_prompt, config.resolution)
    denoiser, output = model.denoiser, Path(config.output_dir)
    encoded = encode(config, model, examples, place.device)
    layers = target_layers(denoiser, config.adapter.target_modules)
    record = record_of(
        config,
        data=encoded.fingerprint,
        base=base_hash(denoiser, layers),
        processes=place.processes,
        origin=file_hash(config.init_from) if start is None else start.record[ORIGIN],
    )
    if start is not None:
        check_same_run(record, start.record, str(start.folder))
    losses = finished_losses(config, record, start)
    if losses is not None:
        path = output / RESULT
        return TrainResult(path, losses, clock.total(), clock.phases, trained_size(read_adapter(path)), config)
    if start is not None and start.step > config.max_train_steps:
        raise QrloraError(
            f"cannot resume: {start.folder} is past max_train_steps={config.max_train_steps}; raise it, or name an "
            "earlier checkpoint folder."
        )
    validation = prepare_validation(config, model, output)
    model.release_encoders(keep_pictures=validation is not None)
    clock.done("encode")
    denoiser.to(place.device)
    parameters = prepare_adapter(config, denoiser, start, cache, progress)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    optimiser = make_optimiser(config, parameters.values())
    curves = torch.zeros(2, config.max_train_steps, device=place.device)
    if start is not None:
        restore(start, denoiser, optimiser, parameters, curves)
    # Nothing of the folder was touched so far: whatever could be refused has been.
    step = 0 if start is None else start.step
    trackers = Trackers(config, place, step)
    if place.main:
        prepare_folder(config, fresh=start is None or not start.within(output))
    accelerator.wait_for_everyone()
    clock.done("adapter")
    return Run(
        config=config,
        model=model,
        accelerator=accelerator,
        place=place,
        output=output,
        encoded=encoded.to(place.device, denoiser.dtype),
        table=model.family.sigma_table(model.pipeline),
        wrapped=denoiser if place.processes == 1 else accelerator.prepare(denoiser),
        parameters=parameters,
        optimiser=optimiser,
        record=record,
        about={"captions": captions_of(examples), "trigger_words": trigger_words(examples)},
        curves=curves,
        validation=validation,
        trackers=trackers,
        step=step,
        checked=step,
        last_good=None if start is None else start.folder,
        outdated=outdated_by(config, start),
    )


def _finish(run: Run, clock: "_Clock") -> TrainResult:
    """The result comes last: where it is, the rest is complete."""
    losses, norms = run.curves.tolist()
    path = run.output / RESULT
    if run.place.main:
        write_losses(run.output, losses, norms)
        run.save_adapter(path, run.config.save_dtype)
        run.forget_outdated(RESULT, LOSSES)
    run.accelerator.wait_for_everyone()
    clock.done("train")
    size = trained_size(adapter_of(run.model.denoiser, ADAPTER_NAME))
    return TrainResult(path, losses, clock.total(), clock.phases, size, run.config)


class _Clock:
    def __init__(self, started: float) -> None:
        self._started = self._last = started
        self.phases: dict[str, float] = {}

    def done(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase] = round(now - self._last, 3)
        self._last = now

    def total(self) -> float:
        return round(time.perf_counter() - self._started, 3)
