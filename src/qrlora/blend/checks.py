"""What would spoil a blend, told before anything is trained or written."""

import warnings
from collections.abc import Iterable
from pathlib import Path

from qrlora.adapter import check_fits_pipeline, layers_in, target_layers
from qrlora.blend.config import BlendConfig
from qrlora.blend.painter import named_as_options
from qrlora.blend.provenance import RunTime
from qrlora.blend.roles import ROLES, Part, Role
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, read_adapter
from qrlora.merging import check_compatible, merge_names, run_time_names
from qrlora.models import GenerationDefaults, LoadedModel
from qrlora.training import TrainConfig

_RESULTS = ("report.json", "blend.png", "content.safetensors", "style.safetensors", "merged.safetensors", "train")


def check_output(config: BlendConfig) -> None:
    """Refuse an output that holds an earlier blend, would destroy an input or be one, and an unknown method.

    Raises:
        QrloraError: as said.
    """
    output = config.output
    if output.exists() and not output.is_dir():
        raise QrloraError(f"--output {output} is a file; name a folder.")
    _check_apart(config)
    _check_inputs_survive(config)
    if not (config.overwrite or config.resume):
        for name in _RESULTS:
            if (output / name).exists():
                raise QrloraError(
                    f"--output {output} holds an earlier blend ({name}); name another folder, continue it with "
                    "--resume, or replace it with --overwrite."
                )
    known = (*merge_names(), *run_time_names())
    if config.method not in known:
        raise QrloraError(f"--method {config.method} is not known; the known ones are {', '.join(known)}.")
    if run_time_of(config) is not None and config.timesteps():
        raise QrloraError(
            f"--method {config.method} chooses by timestep itself; drop --content-timesteps and --style-timesteps."
        )


def run_time_of(config: BlendConfig) -> RunTime | None:
    """The method, where it is one that acts while a picture is drawn."""
    return RunTime(name=config.method) if config.method in run_time_names() else None


def _check_apart(config: BlendConfig) -> None:
    """A folder of pictures is not the output or in it, or a second run would train on what the first one drew."""
    output = config.output.resolve()
    for role in ROLES:
        given: Path | None = getattr(config, role)
        if given is None or not given.is_dir():
            continue
        folder = given.resolve()
        if folder.is_relative_to(output):
            raise QrloraError(
                f"--{role} {given} is --output {config.output} or lies in it; name an output folder elsewhere."
            )


def _check_inputs_survive(config: BlendConfig) -> None:
    """Refuse a given picture or adapter that this blend would write over or remove."""
    output = config.output.resolve()
    written = {output / name for name in (*_RESULTS, "sweep.png")}
    for role in ROLES:
        given: Path | None = getattr(config, role)
        files = config.adapters(role)
        for path in (*files, *(() if given is None else (given,))):
            place = path.resolve()
            if files == (path,) and place == output / f"{role}.safetensors":
                continue  # stays as it is
            redrawn = place.is_relative_to(output / "pictures")
            retrained = config.overwrite and place.is_relative_to(output / "train")
            if place in written or redrawn or retrained:
                raise QrloraError(
                    f"{path} is among the files that this blend replaces in --output {config.output}; copy it "
                    "elsewhere first and give the copy."
                )


def check_plan(config: BlendConfig, parts: dict[Role, Part], model: LoadedModel, settings: GenerationDefaults) -> None:
    """Refuse what would fail only after the training, or show nothing.

    Raises:
        QrloraError: a size the model cannot draw, a sweep of nothing, adapters that do not fit the model or each other.
    """
    with named_as_options():
        model.family.check_size(model.pipeline, settings.height, settings.width)
    trainings: dict[Role, TrainConfig] = {
        role: part.training for role, part in parts.items() if part.training is not None
    }
    steps = max((training.max_train_steps for training in trainings.values()), default=0)
    if config.sweep_steps is not None and config.sweep_steps >= steps:
        raise QrloraError(
            f"--sweep-steps {config.sweep_steps} must be less than the {steps} steps of the training, or the sweep "
            "shows nothing but its end."
        )
    given: dict[Role, list[Adapter]] = {role: [read_adapter(path) for path in parts[role].files] for role in ROLES}
    in_parts = any(config.blocks(role) is not None for role in ROLES) or any(
        training.adapter.blocks is not None for training in trainings.values()
    )
    _check_given([*given["content"], *given["style"]], model, equal_layers=not in_parts)
    if in_parts:
        _check_blocks(config, trainings, given, model)
    else:
        _check_layers(trainings, given, model)
    if config.method == "sum":
        _check_one_basis(trainings, given)


def _check_blocks(
    config: BlendConfig, trainings: dict[Role, TrainConfig], given: dict[Role, list[Adapter]], model: LoadedModel
) -> None:
    """Every role has layers in its blocks, and a sweep shows what is used."""
    for role in ROLES:
        blocks, training = config.blocks(role), trainings.get(role)
        if blocks is None:
            continue
        for adapter in given[role]:
            layers_in(blocks, adapter.layers)
        if training is None:
            continue
        spec = training.adapter
        layers_in(blocks, target_layers(model.denoiser, spec.target_modules, spec.blocks))
        if config.sweep_steps is not None and spec.blocks != blocks:
            raise QrloraError(
                f"--sweep-steps shows whole adapters, but the {role} is trained on {spec.blocks} and used on {blocks}; "
                "drop one of them."
            )


def _check_given(adapters: list[Adapter], model: LoadedModel, *, equal_layers: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QrloraWarning)  # said when they are attached
        for adapter in adapters:
            check_fits_pipeline(model.pipeline, adapter)
    check_compatible(adapters, equal_layers=equal_layers)


def _check_layers(trainings: dict[Role, TrainConfig], given: dict[Role, list[Adapter]], model: LoadedModel) -> None:
    """Only adapters of equal layers merge."""
    named: list[tuple[str, Iterable[str]]] = [
        (adapter.label, adapter.layers) for role in ROLES for adapter in given[role]
    ]
    for role, training in trainings.items():
        named.append((f"the {role} training", target_layers(model.denoiser, training.adapter.target_modules)))
    first, wanted = named[0][0], set(named[0][1])
    for other, layers in named[1:]:
        if odd := sorted(wanted ^ set(layers)):
            has, lacks = (first, other) if odd[0] in wanted else (other, first)
            raise QrloraError(
                f"{has} adapts {odd[0]}, which {lacks} does not, and only equal layers merge; set "
                "adapter.target_modules in --content-config or --style-config to the same layers."
            )


def _check_one_basis(trainings: dict[Role, TrainConfig], given: dict[Role, list[Adapter]]) -> None:
    """What can be known of `sum` before the training; the bases themselves are compared when they are merged."""
    kinds: dict[str, tuple[str, str | None, int]] = {}
    for role in ROLES:
        for adapter in given[role]:
            header, rank = adapter.header, max(pair.rank for pair in adapter.layers.values())
            kinds[adapter.label] = ((header.basis or "lora"), header.side, rank) if header else ("lora", None, rank)
    for role, training in trainings.items():
        spec = training.adapter
        kinds[f"the {role} training"] = (spec.basis, None if spec.plain else spec.side, spec.rank)
    if len(set(kinds.values())) > 1 or any(side is None for _, side, _ in kinds.values()):
        told = "; ".join(f"{name} has {basis} at rank {rank}" for name, (basis, _, rank) in kinds.items())
        raise QrloraError(f"--method sum needs one basis, but {told}; use --method concat.")
