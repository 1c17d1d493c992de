"""Pictures of a model with any of its attached adapters at any weights, each knowing how it was made."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from qrlora import __version__, starter
from qrlora.adapter import (
    ALL_TIMESTEPS,
    TimestepRange,
    adapter_of,
    adapters_by_timestep,
    attach_to_pipeline,
    base_hash,
    check_timesteps,
    denoisers_with,
    pipeline_adapters_disabled,
    remove_from_pipeline,
    resolve_coefficients,
    set_pipeline_adapters,
    target_layers,
    text_encoders_with,
)
from qrlora.blend.provenance import (
    AdapterUse,
    Provenance,
    RunTime,
    SheetProvenance,
    file_hash,
    model_reference,
    relative_to_picture,
    save_picture,
)
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, is_coefficients, read_adapter, read_coefficients, read_metadata
from qrlora.merging import RunTimeRule, adapters_by_rule, run_time_rule
from qrlora.models import GenerationDefaults, LoadedModel
from qrlora.training import load_for
from qrlora.training.config import Memory

_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def choose_place(device: str | None) -> tuple[torch.device, torch.dtype]:
    """The device asked for, else the best there is, and the precision for it: bf16 on CUDA, fp32 elsewhere.

    Raises:
        QrloraError: a device that is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise QrloraError(f"--device {device} is not to be had here; try --device cpu.") from error
    return place, torch.bfloat16 if place.type == "cuda" else torch.float32


def load_painter(model: str | None, device: str | None, memory: Memory | None = None) -> "Painter":
    """A model ready to draw with its own settings.

    Args:
        model: hub id or local diffusers folder; None is the embedded base.
        device: see `choose_place`.
        memory: settings for a card of some size, as in a training.

    Raises:
        QrloraError: a device or a model that is not there.
    """
    place, dtype = choose_place(device)
    loaded = load_for(memory, model or starter.path(), dtype=dtype, device=place)
    return Painter(loaded, model, loaded.defaults)


def settings_of(config: Any, defaults: GenerationDefaults, model: LoadedModel) -> GenerationDefaults:
    """Generation settings with what `config` gives under the same names laid over them.

    Raises:
        QrloraError: a value that is not valid, or means nothing for the model, named as the option.
    """
    family = model.family
    given = {name: getattr(config, name, None) for name in GenerationDefaults.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        settings = GenerationDefaults.model_validate(defaults.model_dump() | given)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise QrloraError(f"--{option} {problem['input']} is not valid: {problem['msg']}.") from error
    with named_as_options():
        family.check_settings(model.pipeline, settings)
    if given.get("negative_prompt") and not family.uses_negative(settings):
        guide, off = family.guided_by, family.guidance_off
        if off == float("inf"):
            raise QrloraError(f"--negative-prompt has no effect on {family.name}, which is not guided so; drop it.")
        raise QrloraError(
            f"--negative-prompt has no effect at a {guide} of {getattr(settings, guide)}; set "
            f"--{guide.replace('_', '-')} above {off:g}."
        )
    return settings


@contextmanager
def named_as_options() -> Iterator[None]:
    """Turn `height=33 must be...`, as a family says it, into `--height 33 must be...`."""
    try:
        yield
    except QrloraError as error:
        name, _, rest = str(error).partition("=")
        raise QrloraError(f"--{name.replace('_', '-')} {rest}") from error


def library_versions() -> dict[str, str]:
    """Versions of what a picture depends on."""
    return {"qrlora": __version__, "python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter file in a picture, at its weight and, unless they are all, its timesteps."""

    file: Path
    sha256: str
    weight: float
    timesteps: TimestepRange | None = None


@dataclass(frozen=True)
class Picture:
    """One generated picture, the adapters in it, its prompt and seed, and the run-time method by which they acted."""

    image: Image.Image
    prompt: str
    seed: int
    adapters: tuple[UsedAdapter, ...]
    method: RunTime | None = None


@dataclass
class Painter:
    """Generates one picture at a time, so that each can be repeated to the last bit whatever else was made.

    Args:
        loaded: the model; adapters are attached to it by `attach`, those of text encoders too, and stay until
            `detach`.
        model: what the user called the model; None is the embedded base. Kept absolute where it is a folder.
        settings: size, steps, guidance.
    """

    loaded: LoadedModel
    model: str | None
    settings: GenerationDefaults
    model_hash: str = field(init=False)
    _files: dict[str, tuple[Path, str]] = field(default_factory=dict[str, tuple[Path, str]], init=False)
    _encoded: dict[Any, dict[str, Tensor]] = field(default_factory=dict[Any, dict[str, Tensor]], init=False)
    _against: dict[Any, dict[str, Tensor]] = field(default_factory=dict[Any, dict[str, Tensor]], init=False)
    _made: dict[Any, Picture] = field(default_factory=dict[Any, Picture], init=False)
    _rules: dict[Any, RunTimeRule] = field(default_factory=dict[Any, RunTimeRule], init=False)

    def __post_init__(self) -> None:
        denoiser = self.loaded.denoiser
        self.model = model_reference(self.model)
        self.model_hash = base_hash(denoiser, target_layers(denoiser, "auto"))

    def attach(self, name: str, path: Path) -> Adapter:
        """Read an adapter file (or peft folder) and put it on the model under `name`."""
        digest = file_hash(path)
        adapter = self.read(path)
        attach_to_pipeline(self.loaded.pipeline, adapter, name)
        try:
            self.loaded.settle()
        except BaseException:
            remove_from_pipeline(self.loaded.pipeline, name)
            raise
        self._files[name] = (path, digest)
        return adapter

    def detach(self, name: str) -> None:
        """Take an adapter off again."""
        remove_from_pipeline(self.loaded.pipeline, name)
        del self._files[name]

    def read(self, path: Path) -> Adapter:
        """An adapter file (or peft folder), whole, also where it holds coefficients alone; nothing is attached."""
        if path.is_file() and is_coefficients(read_metadata(path)):
            return resolve_coefficients(read_coefficients(path), self.loaded.denoiser)
        return read_adapter(path)

    def paint(
        self,
        prompt: str,
        seed: int,
        weights: Mapping[str, float],
        timesteps: Mapping[str, TimestepRange] | None = None,
        *,
        method: RunTime | None = None,
        anew: bool = False,
    ) -> Picture:
        """The picture of `prompt` with attached adapters at `weights`; weight 0 is the same as not there.

        Pictures asked for twice are made once.

        Args:
            prompt: what to show.
            seed: of the noise it starts from.
            weights: by the name an adapter was attached under.
            timesteps: the lowest and highest timestep at which an adapter acts, 0 clean and 1000 pure noise; an
                adapter that is not named acts at all of them. Its part in text encoders always acts: the prompt is read
                once, for all timesteps.
            method: by which adapters act together, in the order of `weights`; they add up where None. With less than
                two left at a weight other than 0 there is nothing to choose from.
            anew: draw it even where it was made before.

        Raises:
            QrloraError: a weight that is not finite, a range that is none, or one of an adapter of text encoders
                alone; a method that is not known, that cannot use these adapters, or besides ranges.
        """
        used = {name: weight for name, weight in weights.items() if weight != 0}
        ranges = {
            name: check_timesteps(bounds, str(self._files[name][0]))
            for name, bounds in (timesteps or {}).items()
            if name in used and bounds != ALL_TIMESTEPS
        }
        for name in ranges.keys() - denoisers_with(self.loaded.pipeline, ranges):
            raise QrloraError(
                f"{self._files[name][0]} adapts text encoders alone, which act at all timesteps; leave its range out."
            )
        rule = None if method is None else self._rule(method, tuple(weights), timesteps)
        if len(used) < 2:
            method = rule = None
        adapters = tuple(UsedAdapter(*self._files[name], used[name], ranges.get(name)) for name in used)
        told = "" if method is None else method.model_dump_json()
        key = (prompt, seed, adapters, told, self.settings.model_dump_json())
        if anew or key not in self._made:
            self._made[key] = Picture(self._generate(prompt, seed, used, ranges, rule), prompt, seed, adapters, method)
        return self._made[key]

    def _rule(
        self, method: RunTime, names: tuple[str, ...], timesteps: Mapping[str, TimestepRange] | None
    ) -> RunTimeRule:
        """What a method makes of attached adapters, found once."""
        if timesteps:
            raise QrloraError(f"--method {method.name} chooses by timestep itself; leave ranges of timesteps out.")
        key = (method.model_dump_json(), tuple(self._files[name][1] for name in names))
        if key not in self._rules:
            parts = [
                replace(adapter_of(self.loaded.denoiser, name), source=str(self._files[name][0])) for name in names
            ]
            self._rules[key] = run_time_rule(method.name, parts, **method.options)
        return self._rules[key]

    def _acting(
        self, weights: Mapping[str, float], ranges: Mapping[str, TimestepRange], rule: RunTimeRule | None
    ) -> AbstractContextManager[None]:
        """The adapters of one picture on the model."""
        model = self.loaded
        if not weights:
            return pipeline_adapters_disabled(model.pipeline)
        set_pipeline_adapters(model.pipeline, weights)
        given = partial(model.family.given_timesteps, model.pipeline)
        if rule is not None:
            return adapters_by_rule(model.denoiser, weights, rule, given)
        if ranges:
            here = {name: weights[name] for name in denoisers_with(model.pipeline, weights)}
            return adapters_by_timestep(model.denoiser, here, ranges, given)
        return nullcontext()

    def _generate(
        self,
        prompt: str,
        seed: int,
        weights: Mapping[str, float],
        ranges: Mapping[str, TimestepRange],
        rule: RunTimeRule | None,
    ) -> Image.Image:
        model, settings = self.loaded, self.settings
        # What a prompt is read as depends on these alone.
        words = tuple((self._files[name][1], weights[name]) for name in text_encoders_with(model.pipeline, weights))
        with self._acting(weights, ranges, rule):
            return model.family.generate(
                model.pipeline,
                [prompt],
                seeds=[seed],
                conditioning=self._encode(prompt, words),
                negative_conditioning=self._encode_negative(words) if model.family.uses_negative(settings) else None,
                **settings.model_dump(),
            )[0]

    def _encode(self, prompt: str, words: Any) -> dict[str, Tensor]:
        model, length = self.loaded, self.settings.max_sequence_length
        key = (prompt, words, length)
        if key not in self._encoded:
            self._encoded[key] = model.family.encode_prompts(model.pipeline, [prompt], length)
        return self._encoded[key]

    def _encode_negative(self, words: Any) -> dict[str, Tensor]:
        model, prompt, length = self.loaded, self.settings.negative_prompt, self.settings.max_sequence_length
        key = (prompt, words, length)
        if key not in self._against:
            self._against[key] = model.family.encode_negative(model.pipeline, prompt, length)
        return self._against[key]

    def save(self, picture: Picture, path: Path) -> Path:
        """Write a picture as PNG with its provenance."""
        return save_picture(picture.image, path, self.provenance(picture, path))

    def provenance(self, picture: Picture, path: Path) -> Provenance:
        """How `picture` was made, for a file at `path`."""
        denoiser = self.loaded.denoiser
        return Provenance(
            prompt=picture.prompt,
            seed=picture.seed,
            model=self.model,
            model_hash=self.model_hash,
            adapters=tuple(
                AdapterUse(
                    file=relative_to_picture(used.file, path),
                    sha256=used.sha256,
                    weight=used.weight,
                    timesteps=used.timesteps,
                )
                for used in picture.adapters
            ),
            settings=self.settings.model_dump(),
            device=str(denoiser.device.type),
            dtype=str(denoiser.dtype).removeprefix("torch."),
            quantization=self.loaded.quantization,
            method=picture.method,
            versions=library_versions(),
        )

    def sheet_provenance(
        self,
        path: Path,
        prompt: str,
        seed: int,
        adapters: Sequence[tuple[Path, float]],
        pictures: Sequence[str],
        timesteps: Mapping[Path, TimestepRange] | None = None,
        method: RunTime | None = None,
    ) -> SheetProvenance:
        """What stands in a sheet at `path`: the job, its adapter files, and where its single pictures are."""
        ranges = timesteps or {}
        return SheetProvenance(
            prompt=prompt,
            seed=seed,
            model=self.model,
            model_hash=self.model_hash,
            adapters=tuple(
                AdapterUse(
                    file=relative_to_picture(file, path),
                    sha256=file_hash(file),
                    weight=weight,
                    timesteps=ranges.get(file),
                )
                for file, weight in adapters
            ),
            settings=self.settings.model_dump(),
            method=method,
            pictures=tuple(pictures),
        )
