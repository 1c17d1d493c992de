"""Pictures of a model with any of its attached adapters at any weights, each knowing how it was made."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from qrlora import __version__, starter
from qrlora.adapter import (
    adapters_disabled,
    attach_adapter,
    base_hash,
    remove_adapter,
    resolve_coefficients,
    set_adapters,
    target_layers,
)
from qrlora.blend.provenance import (
    AdapterUse,
    Provenance,
    SheetProvenance,
    file_hash,
    model_reference,
    relative_to_picture,
    save_picture,
)
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, is_coefficients, read_adapter, read_coefficients, read_metadata
from qrlora.models import GenerationDefaults, LoadedModel, load_pipeline

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


def load_painter(model: str | None, device: str | None) -> "Painter":
    """A model ready to draw with its own settings.

    Args:
        model: hub id or local diffusers folder; None is the embedded base.
        device: see `choose_place`.

    Raises:
        QrloraError: a device or a model that is not there.
    """
    place, dtype = choose_place(device)
    loaded = load_pipeline(model or starter.path(), dtype=dtype, device=place)
    return Painter(loaded, model, loaded.defaults)


def settings_of(config: Any, defaults: GenerationDefaults) -> GenerationDefaults:
    """The model's generation settings with what `config` gives under the same names laid over them.

    Raises:
        QrloraError: a value that is not valid, named as the option.
    """
    given = {name: getattr(config, name, None) for name in GenerationDefaults.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return GenerationDefaults.model_validate(defaults.model_dump() | given)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise QrloraError(f"--{option} {problem['input']} is not valid: {problem['msg']}.") from error


def library_versions() -> dict[str, str]:
    """Versions of what a picture depends on."""
    return {"qrlora": __version__, "python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


@dataclass(frozen=True)
class Picture:
    """One generated picture, the adapters in it as (file, sha256, weight), and its prompt and seed."""

    image: Image.Image
    prompt: str
    seed: int
    adapters: tuple[tuple[Path, str, float], ...]


@dataclass
class Painter:
    """Generates one picture at a time, so that each can be repeated to the last bit whatever else was made.

    Args:
        loaded: the model; adapters are attached to its denoiser by `attach` and stay until `detach`.
        model: what the user called the model; None is the embedded base. Kept absolute where it is a folder.
        settings: size, steps, guidance.
    """

    loaded: LoadedModel
    model: str | None
    settings: GenerationDefaults
    model_hash: str = field(init=False)
    _files: dict[str, tuple[Path, str]] = field(default_factory=dict[str, tuple[Path, str]], init=False)
    _encoded: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]], init=False)
    _made: dict[Any, Picture] = field(default_factory=dict[Any, Picture], init=False)

    def __post_init__(self) -> None:
        denoiser = self.loaded.denoiser
        self.model = model_reference(self.model)
        self.model_hash = base_hash(denoiser, target_layers(denoiser, "auto"))

    def attach(self, name: str, path: Path) -> Adapter:
        """Read an adapter file (or peft folder) and put it on the denoiser under `name`."""
        digest = file_hash(path)
        adapter = self._read(path)
        attach_adapter(self.loaded.denoiser, adapter, name)
        self._files[name] = (path, digest)
        return adapter

    def detach(self, name: str) -> None:
        """Take an adapter off again."""
        remove_adapter(self.loaded.denoiser, name)
        del self._files[name]

    def _read(self, path: Path) -> Adapter:
        if path.is_file() and is_coefficients(read_metadata(path)):
            return resolve_coefficients(read_coefficients(path), self.loaded.denoiser)
        return read_adapter(path)

    def paint(self, prompt: str, seed: int, weights: Mapping[str, float]) -> Picture:
        """The picture of `prompt` with attached adapters at `weights`; weight 0 is the same as not there.

        Pictures asked for twice are made once.
        """
        used = {name: weight for name, weight in weights.items() if weight != 0}
        adapters = tuple((*self._files[name], weight) for name, weight in used.items())
        key = (prompt, seed, adapters)
        if key not in self._made:
            self._made[key] = Picture(self._generate(prompt, seed, used), prompt, seed, adapters)
        return self._made[key]

    def _generate(self, prompt: str, seed: int, weights: Mapping[str, float]) -> Image.Image:
        model, settings = self.loaded, self.settings
        if weights:
            set_adapters(model.denoiser, weights)
        guided = settings.true_cfg_scale > 1
        with nullcontext() if weights else adapters_disabled(model.denoiser):
            return model.family.generate(
                model.pipeline,
                [prompt],
                seeds=[seed],
                conditioning=self._encode(prompt),
                negative_conditioning=self._encode(settings.negative_prompt) if guided else None,
                **settings.model_dump(),
            )[0]

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        if prompt not in self._encoded:
            model = self.loaded
            self._encoded[prompt] = model.family.encode_prompts(
                model.pipeline, [prompt], self.settings.max_sequence_length
            )
        return self._encoded[prompt]

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
                AdapterUse(file=relative_to_picture(file, path), sha256=digest, weight=weight)
                for file, digest, weight in picture.adapters
            ),
            settings=self.settings.model_dump(),
            device=str(denoiser.device.type),
            dtype=str(denoiser.dtype).removeprefix("torch."),
            versions=library_versions(),
        )

    def sheet_provenance(
        self, path: Path, prompt: str, seed: int, adapters: Sequence[tuple[Path, float]], pictures: Sequence[str]
    ) -> SheetProvenance:
        """What stands in a sheet at `path`: the job, its adapter files, and where its single pictures are."""
        return SheetProvenance(
            prompt=prompt,
            seed=seed,
            model=self.model,
            model_hash=self.model_hash,
            adapters=tuple(
                AdapterUse(file=relative_to_picture(file, path), sha256=file_hash(file), weight=weight)
                for file, weight in adapters
            ),
            settings=self.settings.model_dump(),
            pictures=tuple(pictures),
        )
