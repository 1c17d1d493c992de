"""One training loop for every family."""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from qrlora.adapter import BasisCache, adapter_of_pipeline, base_hash, target_layers, trained_size
from qrlora.data import Source
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter
from qrlora.models import LoadedModel
from qrlora.training.card import CardFacts, write_card
from qrlora.training.checkpoint import Checkpoint
from qrlora.training.config import TrainConfig
from qrlora.training.ema import average_of
from qrlora.training.folder import (
    LOSSES,
    RESULT,
    find_start,
    finished_losses,
    outdated_by,
    prepare_folder,
    told_kept,
    write_losses,
)
from qrlora.training.hub import find_repository, push
from qrlora.training.interrupt import graceful_stop
from qrlora.training.memory import enough_memory
from qrlora.training.objective import check_levels
from qrlora.training.optimiser import check_packages, make_optimiser
from qrlora.training.pictures import captions_of, encode, find_sources, trigger_words
from qrlora.training.prior import check_class_folder, prepare_prior
from qrlora.training.processes import asks_for_sharding, join_launch, watching
from qrlora.training.progress import ProgressReport
from qrlora.training.record import ORIGIN, check_same_run, record_of
from qrlora.training.run import OnStep, Run
from qrlora.training.setup import (
    ADAPTER_NAME,
    Place,
    borrowed,
    choose_device,
    file_hash,
    load_model,
    prepare_adapter,
    restore,
)
from qrlora.training.sharding import check_shardable, shard
from qrlora.training.split import as_drawn, split_of
from qrlora.training.trackers import Trackers
from qrlora.training.validation import last_pictures, prepare_validation
from qrlora.training.words import Words, add_words, check_initial, trained_encoders


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        path: the adapter file.
        losses: mean loss of each optimiser step, from step 0 also where the run was resumed.
        seconds: of this call, from its start.
        phases: seconds by phase of this call: load, encode, class (pictures), adapter, train.
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
    sources = find_sources(config)  # a wrong path is told before a large model is loaded
    check_class_folder(config)
    if config.init_from is not None:
        check_initial(config, read_adapter(config.init_from))  # and so is a wrong adapter
    check_packages(config)
    accelerator = join_launch(config.device)
    with watching(accelerator, partial(told_kept, Path(config.output_dir))):
        repository = find_repository(config) if accelerator.is_main_process else None
        device = choose_device(config, loaded, accelerator)
        model, config = load_model(config, loaded, device, start)
        place = Place(
            device,
            config.mixed_precision == "bf16",
            accelerator.process_index,
            accelerator.num_processes,
            sharded=asks_for_sharding(accelerator),
        )
        if place.sharded:
            check_shardable(config, model, given=loaded is not None)
        clock = _Clock(started)
        clock.done("load")
        shown = progress and place.main
        with enough_memory(config), borrowed(model, give_back=loaded is not None):
            run = _prepare(config, model, sources, accelerator, place, start, clock, progress=shown, cache=cache)
            result = run if isinstance(run, TrainResult) else _train(run, clock, repository, on_step, shown=shown)
        accelerator.wait_for_everyone()
    return _pushed(result, repository, shown=shown)


def _prepare(
    config: TrainConfig,
    model: LoadedModel,
    sources: list[Source],
    accelerator: Accelerator,
    place: Place,
    start: Checkpoint | None,
    clock: "_Clock",
    *,
    progress: bool,
    cache: BasisCache | None,
) -> "Run | TrainResult":
    output = Path(config.output_dir)
    process = model.family.noise_process(model.pipeline)
    check_levels(config, process)
    encoders = trained_encoders(config, model)
    encoded = encode(config, model, sources, place.device, progress=progress)
    validation, preserved = prepare_validation(config, model, output), prepare_prior(config, model)
    model.release_encoders(keep_pictures=validation is not None or preserved is not None, keep=encoders)
    clock.done("encode")
    # Last, so that it never shares memory with the encoders. One to be shared out is never whole on a device.
    model.load_denoiser("cpu" if place.sharded else place.device)
    denoiser = model.denoiser
    prior = None
    if preserved is not None:
        prior = preserved.encode(model, accelerator, place, progress=progress)
        model.release_encoders(keep_pictures=validation is not None, keep=encoders)
        clock.done("class")
    layers = target_layers(denoiser, config.adapter.target_modules, config.adapter.blocks)
    split = split_of(config, place.process, place.processes)
    record = record_of(
        split.config,
        data=encoded.fingerprint,
        class_data=None if prior is None else prior.fingerprint,
        base=base_hash(denoiser, layers),
        origin=file_hash(config.init_from) if start is None else start.record[ORIGIN],
    )
    if start is not None:
        check_same_run(record, start.record, str(start.folder))
        split = split_of(config, place.process, place.processes, start.record)
        split.check(max(len(each.groups) for each in (encoded, prior) if each is not None))
        record |= as_drawn(split)
    losses = finished_losses(config, record, start)
    if losses is not None:
        path = output / RESULT
        return TrainResult(path, losses, clock.total(), clock.phases, trained_size(read_adapter(path)), config)
    if start is not None and start.step > config.max_train_steps:
        raise QrloraError(
            f"cannot resume: {start.folder} is past max_train_steps={config.max_train_steps}; raise it, or name an "
            "earlier checkpoint folder."
        )
    parameters = prepare_adapter(config, denoiser, start, cache, accelerator, place, progress=progress)
    model.settle()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if place.sharded:
        shard(denoiser, place.device, place.processes)
    words = add_words(config, model, encoders, start, cache, place)
    optimiser = make_optimiser(config, parameters.values(), words.values())
    parameters |= words
    curves = torch.zeros(2, config.max_train_steps, device=place.device)
    step = 0 if start is None else start.step
    average = average_of(config, parameters, step)
    if start is not None:
        restore(start, denoiser, optimiser, parameters, average, curves)
    # Nothing of the folder was touched so far: whatever could be refused has been.
    trackers = Trackers(config, place, step)
    if place.main:
        prepare_folder(config)
    accelerator.wait_for_everyone()
    clock.done("adapter")
    return Run(
        config=config,
        model=model,
        accelerator=accelerator,
        place=place,
        output=output,
        encoded=encoded.to(denoiser.dtype),
        prior=None if prior is None else prior.to(denoiser.dtype),
        process=process,
        split=split,
        parameters=parameters,
        words=Words(model.family, model.pipeline, place.device) if encoders else None,
        optimiser=optimiser,
        average=average,
        record=record,
        about={"captions": captions_of(sources), "trigger_words": trigger_words(sources)},
        curves=curves,
        validation=validation,
        trackers=trackers,
        step=step,
        checked=step,
        last_good=None if start is None else start.folder,
        outdated=outdated_by(config, start),
    )


def _train(run: Run, clock: "_Clock", repository: str | None, on_step: OnStep | None, *, shown: bool) -> TrainResult:
    config = run.config
    with (
        run.trackers,
        run.casting(),
        graceful_stop() as stop,
        ProgressReport("train", config.max_train_steps, done=run.step, shown=shown) as report,
    ):
        while run.step < config.max_train_steps:
            run.train_step()
            run.after_step(report, stop, on_step)
    return _finish(run, clock, repository)


def _finish(run: Run, clock: "_Clock", repository: str | None) -> TrainResult:
    """The result comes last: where it is, the rest is complete."""
    losses, norms = run.curves.tolist()
    path, adapter = run.output / RESULT, adapter_of_pipeline(run.model.pipeline, ADAPTER_NAME)
    if run.place.main:
        with run.telling_what_is_kept():
            write_losses(run.output, losses, norms)
            write_card(CardFacts(run.config, run.model, adapter, **run.about, repository=repository))
            run.save_adapter(path, run.config.save_dtype)
        run.forget_outdated(RESULT, LOSSES)
    clock.done("train")
    return TrainResult(path, losses, clock.total(), clock.phases, trained_size(adapter), run.config)


def _pushed(result: TrainResult, repository: str | None, *, shown: bool) -> TrainResult:
    """The result, on the hub too where that was asked for."""
    if repository is not None:
        address = push(repository, result.config, last_pictures(result.config))
        if shown:
            print(f"pushed to {address}", file=sys.stderr, flush=True)
    return result


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
