"""From a configuration to a model with a trainable adapter."""

import hashlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from qrlora.adapter import (
    BasisCache,
    adapters_set_aside,
    add_adapter,
    attach_adapter,
    basis_notice,
    compute_bases,
    pipeline_adapter_names,
    ranks_of,
    remove_from_pipeline,
    restore_kept,
    set_adapters,
    target_layers,
    trainable_parameters,
)
from qrlora.data import training_sizes
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import read_adapter
from qrlora.models import LoadedModel, load_pipeline, read_settings
from qrlora.training.checkpoint import CURVES, KEPT, Checkpoint
from qrlora.training.config import TrainConfig
from qrlora.training.ema import EMA, MovingAverage
from qrlora.training.memory import as_loaded, with_preset
from qrlora.training.optimiser import GROUP, load_optimiser_tensors
from qrlora.training.progress import counting

ADAPTER_NAME = "being_trained"
Precision = Literal["no", "bf16"]


@dataclass(frozen=True)
class Place:
    """Where and how this process computes."""

    device: torch.device
    autocast: bool
    process: int
    processes: int
    sharded: bool = False
    """Whether each process keeps a share of the base alone."""

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.process == 0


def choose_device(config: TrainConfig, loaded: LoadedModel | None, accelerator: Accelerator) -> torch.device:
    """`config.device`, else where a given model already is, else accelerate's choice."""
    if config.device is not None:
        try:
            return torch.empty(0, device=config.device).device
        except (RuntimeError, AssertionError) as error:
            raise QrloraError(f"device={config.device} is not to be had here; try device: cpu.") from error
    if loaded is not None and accelerator.num_processes == 1:
        return torch.device(loaded.denoiser.device)
    # On the CPU accelerate numbers it by process, but there is one.
    return torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device


def choose_precision(
    config: TrainConfig, defaults: Mapping[str, Any], device: torch.device, start: Checkpoint | None = None
) -> Precision:
    """The configuration's word, else that of the run that is continued, else the model's own, else the device's.

    Args:
        config: as given, `mixed_precision` open or not.
        defaults: the model's own training defaults.
        device: where the run computes.
        start: the checkpoint that the run goes on from.

    Raises:
        QrloraError: defaults that are not valid.
    """
    then: Precision | None = None if start is None else start.record.get("mixed_precision")
    return (
        config.mixed_precision
        or then
        or config.with_defaults(defaults).mixed_precision
        or ("bf16" if device.type == "cuda" else "no")
    )


def load_model(
    config: TrainConfig, loaded: LoadedModel | None, device: torch.device, start: Checkpoint | None = None
) -> tuple[LoadedModel, TrainConfig]:
    """The model, in the base's dtype and without its denoiser's weights, and the configuration with nothing left open.

    A model that was given is whole and stays as it was loaded: in its dtype, which decides where neither configuration
    nor model do, quantised and offloaded as it is.
    """
    if loaded is None:
        source = config.model or _embedded()
        precision = choose_precision(config, read_settings(source).training, device, start)
        # On the CPU: encoders and denoiser take turns, in its memory and on the device.
        loaded = load_pipeline(source, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, denoiser=False)
        config = config.with_defaults(with_preset(config, loaded))
        loaded.keep_as(config.quantization, config.offload, config.encoder_offload)
    else:
        config = as_loaded(config.with_defaults(with_preset(config, loaded)), loaded)
        precision = config.mixed_precision or ("bf16" if loaded.denoiser.dtype == torch.bfloat16 else "no")
    resolution = config.resolution or loaded.defaults.height
    multiple = loaded.family.latent_multiple(loaded.pipeline)
    if resolution % multiple:
        raise QrloraError(f"resolution={resolution} must be a multiple of {multiple} for {loaded.model_id}.")
    training_sizes(config.aspect_ratio_buckets, resolution, multiple)  # refused before anything is read
    if config.guidance_scale != 1 and not loaded.family.has_guidance_embedding(loaded.denoiser):
        warnings.warn(
            f"guidance_scale={config.guidance_scale} has no effect on the training: {loaded.model_id} has no guidance "
            "embedding.",
            QrloraWarning,
            stacklevel=3,
        )
    settled: dict[str, Any] = {"mixed_precision": precision, "resolution": resolution}
    if config.train_text_encoder:
        settled["text_encoder_lr"] = config.text_encoder_lr or config.learning_rate
    return loaded, config.model_copy(update=settled)


def _embedded() -> str:
    from qrlora.starter import path

    return str(path())


@contextmanager
def borrowed(model: LoadedModel, *, give_back: bool) -> Iterator[None]:
    """Afterwards, a caller's model is as it was: no adapter of ours, its own active again, encoders and device
    restored."""
    device = model.device
    try:
        with adapters_set_aside(model.pipeline):
            try:
                yield
            finally:
                model.denoiser.disable_gradient_checkpointing()
                if ADAPTER_NAME in pipeline_adapter_names(model.pipeline):
                    remove_from_pipeline(model.pipeline, ADAPTER_NAME)
    finally:
        if give_back:
            model.load_denoiser(device)
            model.restore_encoders(device)


def prepare_adapter(
    config: TrainConfig,
    denoiser: nn.Module,
    start: Checkpoint | None,
    cache: BasisCache | None,
    accelerator: Accelerator,
    place: Place,
    *,
    progress: bool,
) -> dict[str, nn.Parameter]:
    """Put the adapter on the denoiser, alone active, and return what is trained.

    A resumed run takes the stored basis rather than a recomputed one, which may differ in its last bits. Several
    processes compute the bases of a share of the layers each, and find the others' in the cache.
    """
    if start is not None:
        adapter = read_adapter(start.adapter)
        attach_adapter(denoiser, adapter, ADAPTER_NAME, trainable=True, spec=config.adapter, cache=cache)
    elif config.init_from is not None:
        _attach_initial(config, denoiser, config.init_from, cache)
    else:
        _add_new(config, denoiser, cache, accelerator, place, progress)
    set_adapters(denoiser, {ADAPTER_NAME: 1.0})
    return trainable_parameters(denoiser, ADAPTER_NAME)


def _add_new(
    config: TrainConfig,
    denoiser: nn.Module,
    cache: BasisCache | None,
    accelerator: Accelerator,
    place: Place,
    progress: bool,
) -> None:
    notice = basis_notice(denoiser, config.adapter, cache=cache) if progress else None
    if notice is not None:
        print(notice, file=sys.stderr, flush=True)
    # On the device also where the denoiser's weights are kept on the CPU.
    if place.processes > 1:
        share = (place.process, place.processes)
        with counting("basis", shown=progress) as advance:
            compute_bases(denoiser, config.adapter, share, cache=cache, progress=advance, device=place.device)
        accelerator.wait_for_everyone()
    with counting("basis", shown=progress) as advance:
        add_adapter(denoiser, config.adapter, ADAPTER_NAME, cache=cache, progress=advance, device=place.device)


def _attach_initial(config: TrainConfig, denoiser: nn.Module, path: str, cache: BasisCache | None) -> None:
    adapter, spec = read_adapter(path), config.adapter
    ranks = ranks_of(adapter)
    if ranks != {spec.rank}:
        raise QrloraError(
            f"init_from: {path} has rank {', '.join(map(str, sorted(ranks)))}, but adapter.rank is {spec.rank}; make "
            "them equal."
        )
    if adapter.header is not None and not spec.plain and adapter.header.mask != spec.mask:
        raise QrloraError(
            f"init_from: {path} has mask {adapter.header.mask!r}, but adapter.mask is {spec.mask!r}; make them equal."
        )
    _check_layers(path, set(adapter.layers), set(target_layers(denoiser, spec.target_modules, spec.blocks)))
    attach_adapter(denoiser, adapter, ADAPTER_NAME, trainable=True, spec=spec, cache=cache)


def _check_layers(path: str, has: set[str], wants: set[str]) -> None:
    if has == wants:
        return
    odd = min(has ^ wants)
    told = (
        f"adapts {odd}, which adapter.target_modules and adapter.blocks do not mean"
        if odd in has
        else f"does not adapt {odd}, which adapter.target_modules and adapter.blocks mean"
    )
    raise QrloraError(
        f"init_from: {path} {told}; set adapter.target_modules to the file's own layers (qrlora inspect --json lists "
        "them)."
    )


def file_hash(path: str | None) -> str | None:
    """sha256 of an adapter file (or of the files of a peft folder), None for None."""
    if path is None:
        return None
    digest = hashlib.sha256()
    found = Path(path)
    for file in sorted(found.iterdir()) if found.is_dir() else [found]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def restore(
    start: Checkpoint,
    denoiser: nn.Module,
    optimiser: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    average: MovingAverage | None,
    curves: torch.Tensor,
) -> None:
    """Coefficients, frozen tensors, optimiser states, average and curves as they were at the checkpoint.

    Raises:
        QrloraError: the checkpoint holds other parameters than this model's adapter.
    """
    if start.torch_version != torch.__version__:
        warnings.warn(
            f"{start.folder} was written under torch {start.torch_version}, this is {torch.__version__}: the run goes "
            "on, but not bit for bit.",
            QrloraWarning,
            stacklevel=2,
        )
    tensors = start.tensors()
    past = tensors.pop(CURVES)
    kept = {key.removeprefix(KEPT): tensors.pop(key) for key in list(tensors) if key.startswith(KEPT)}
    averages = {key.removeprefix(EMA): tensors.pop(key) for key in list(tensors) if key.startswith(EMA)}
    stored = {key.partition("/")[2] for key in tensors if not key.startswith(GROUP)}
    if stored != set(parameters):
        odd = sorted(stored ^ set(parameters))[0]
        raise QrloraError(f"{start.folder} does not fit this adapter: {odd} is in one of them only.")
    restore_kept(denoiser, ADAPTER_NAME, kept)
    load_optimiser_tensors(optimiser, parameters, tensors)
    if average is not None:
        average.load(averages)
    curves[:, : start.step] = past.to(curves.device)


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """The configuration as trackers take it: flat, numbers and strings only."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        for name, part in value.items() if isinstance(value, dict) else (("", value),):
            flat[f"{key}.{name}" if name else key] = part if isinstance(part, bool | int | float) else str(part)
    return flat
