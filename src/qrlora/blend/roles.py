"""The two roles of a blend: where the adapter of each comes from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from qrlora import starter
from qrlora.blend.config import BlendConfig
from qrlora.blend.usage import trained_captions
from qrlora.data import load_examples, open_picture, square
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, atomic_write, read_adapter
from qrlora.models import LoadedModel
from qrlora.training import TrainConfig, TrainResult, train
from qrlora.training.config import Memory

Role = Literal["content", "style"]
ROLES: tuple[Role, Role] = ("content", "style")
_CHUNK = 1 << 24
_GOES_WITH_A_BASIS = {"form", "side", "band", "mask", "init", "init_std", "experts", "top_k", "solver"}


@dataclass
class Part:
    """One role.

    Attributes:
        role: content or style.
        source: in words, where its adapter comes from.
        data: pictures to train on; None where adapters are given.
        prompt: what the role alone is asked for; None if nothing tells.
        reference: the first picture, for the sheet.
        caption: what stands under the reference.
        files: its adapter files; known after training.
        training: how to train it; None where adapters are given.
        steps: optimiser steps its training took; 0 where it was given.
    """

    role: Role
    source: str
    data: Path | None = None
    prompt: str | None = None
    reference: Image.Image | None = None
    caption: str = ""
    files: list[Path] = field(default_factory=list[Path])
    training: TrainConfig | None = None
    steps: int = 0


def plan_parts(config: BlendConfig) -> tuple[dict[Role, Part], str]:
    """Both roles and the prompt of the merge, with every picture and adapter looked at before anything is trained.

    Raises:
        QrloraError: a missing, damaged or contradictory input.
    """
    bundled = [role for role in ROLES if getattr(config, role) is None and not config.adapters(role)]
    if bundled and config.model is not None:
        raise QrloraError(
            f"the bundled samples are for the embedded base; with --model give --{bundled[0]} (a picture) or "
            f"--{bundled[0]}-adapter (a file)."
        )
    prompt = starter.samples().prompt if config.prompt is None and len(bundled) == len(ROLES) else config.prompt
    if not prompt:
        raise QrloraError('what is the merge to show? Give --prompt, such as "a <c> dog in <s> style".')
    parts: dict[Role, Part] = {role: _plan(config, role) for role in ROLES}
    for part in parts.values():
        if part.data is not None:
            part.training = _train_config(config, part)
    return parts, prompt


def _plan(config: BlendConfig, role: Role) -> Part:
    given: str | None = getattr(config, f"{role}_prompt")
    files = config.adapters(role)
    if files:
        adapters = [read_adapter(path) for path in files]
        return Part(
            role,
            source=", ".join(str(path) for path in files),
            prompt=given or _caption_of(adapters[0]),
            caption=", ".join(path.name for path in files),
            files=list(files),
        )
    data: Path | None = getattr(config, role)
    if data is None:
        bundled = starter.samples()
        data = bundled.content if role == "content" else bundled.style
        given = given or (bundled.content_prompt if role == "content" else bundled.style_prompt)
    try:
        first = load_examples(data, given, 64)[0]
    except QrloraError as error:
        words = str(error).removeprefix("instance_data_dir: ").replace("instance_prompt", f"--{role}-prompt")
        raise QrloraError(f"--{role}: {words}") from error
    picture = open_picture(first.name).rgb
    return Part(
        role,
        source=str(data),
        data=data,
        prompt=given or first.caption,
        reference=square(picture, min(512, *picture.size)),
        caption=f'"{first.caption}"',
    )


def fill_trainings(parts: Mapping[Role, Part], model: LoadedModel) -> None:
    """Fill what a training was not told from the model's defaults, those for its role before those for all.

    A model's own basis is left out where something is told that goes with another one, such as a mask; and with it, or
    where another basis is told, the learning rate that was found for it.
    """
    for part in parts.values():
        if part.training is not None:
            of_role = dict(model.roles.get(part.role, {}))
            told = part.training.adapter
            if told.model_fields_set & _GOES_WITH_A_BASIS:
                of_role.pop("basis", None)
            if "basis" not in of_role or ("basis" in told.model_fields_set and told.basis != of_role["basis"]):
                of_role.pop("learning_rate", None)
            part.training = part.training.with_defaults({**model.training, **of_role})


def _caption_of(adapter: Adapter) -> str | None:
    """The first caption an adapter of ours was trained on."""
    return next(iter(trained_captions(adapter)), None)


def train_part(part: Part, model: LoadedModel, *, progress: bool) -> TrainResult | None:
    """Train the adapter of a role; None where it was given."""
    if part.training is None:
        return None
    result = train(part.training, loaded=model, progress=progress)
    part.files, part.steps = [result.path], result.config.max_train_steps
    return result


def _train_config(config: BlendConfig, part: Part) -> TrainConfig:
    common = {
        "adapter.rank": config.rank,
        "adapter.basis": config.basis,
        "max_train_steps": config.max_train_steps,
        "learning_rate": config.learning_rate,
        "train_batch_size": config.train_batch_size,
        "checkpointing_steps": config.sweep_steps,
        "memory": config.memory,
    }
    values: dict[str, Any] = {key: value for key, value in common.items() if value is not None} | {
        "instance_data_dir": str(part.data),
        "instance_prompt": part.prompt,
        "output_dir": str(config.output / "train" / part.role),
        "overwrite": config.overwrite,
        "resume": "latest" if config.resume else None,
        "model": config.model,
    }
    if part.role == "content" and config.content_looks is not None:
        values["looks"] = config.content_looks
    if "seed" in config.model_fields_set or getattr(config, f"{part.role}_config") is None:
        values["seed"] = config.seed
    more: Path | None = getattr(config, f"{part.role}_config")
    if more is not None:
        _check_model(config, more, values)
    training = (
        TrainConfig.parse(values, f"the {part.role} training") if more is None else TrainConfig.from_yaml(more, values)
    )
    blocks, bounds = config.blocks(part.role), config.timesteps().get(part.role)
    if blocks is not None and training.adapter.blocks is None:
        training = training.with_defaults({"adapter": {"blocks": blocks}})
    if bounds is not None and not {"min_timestep", "max_timestep"} & training.model_fields_set:
        training = training.with_defaults({"min_timestep": bounds[0], "max_timestep": bounds[1]})
    return training


def _check_model(config: BlendConfig, more: Path, values: Mapping[str, Any]) -> None:
    """A configuration for some model is not trained on the embedded base without a word."""
    named = TrainConfig.from_yaml(more, {key: value for key, value in values.items() if key != "model"}).model
    if named is not None and config.model is None:
        raise QrloraError(
            f"{more} names the model {named}, but a blend is of one model and takes it from --model; give "
            f"--model {named}, or take the line out."
        )


def agree_on_memory(config: BlendConfig, parts: Mapping[Role, Part]) -> Memory | None:
    """The one `memory` of a blend, given to both trainings, since they share a model.

    Raises:
        QrloraError: the trainings want different ones, or say in other words how the model is to be kept.
    """
    trainings = [part.training for part in parts.values() if part.training is not None]
    wanted: list[Memory] = [training.memory for training in trainings if training.memory is not None]
    if config.memory is None and len(set(wanted)) > 1:
        raise QrloraError(
            f"--content-config and --style-config ask for memory {' and '.join(wanted)}; give both one with --memory."
        )
    memory: Memory | None = config.memory or next(iter(wanted), None)
    for name, default in (("quantization", None), ("offload", "none"), ("encoder_offload", "none")):
        if memory is None and any(getattr(training, name) != default for training in trainings):
            raise QrloraError(
                f"{name} stands in --content-config or --style-config, but the model of a blend is kept as --memory "
                "has it; give --memory instead."
            )
    for part in parts.values():
        if part.training is not None and memory is not None:
            part.training = part.training.model_copy(update={"memory": memory})
    return memory


def copy_file(source: Path, target: Path) -> None:
    """Copy byte for byte, whole or not at all."""
    if source.resolve() == target.resolve():
        return

    def chunks() -> Iterator[bytes]:
        with source.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    atomic_write(target, chunks())
