"""From a hub id or a folder to a pipeline with its family and its defaults."""

import gc
import json
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from transformers.utils import logging as transformers_logging

from qrlora.errors import QrloraError
from qrlora.models._family import Family, GenerationDefaults, family_of

SETTINGS_FILE = "qrlora.json"


class ModelSettings(BaseModel):
    """`qrlora.json` in a model folder; other keys are the folder's own business.

    Attributes:
        name: what the model is called.
        generation: how it wants its pictures made, as in `GenerationDefaults`.
        training: defaults for `TrainConfig`.
        roles: what differs from `training` in a blend's "content" or "style".
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str | None = None
    generation: dict[str, Any] = {}
    training: dict[str, Any] = {}
    roles: dict[Literal["content", "style"], dict[str, Any]] = {}


@dataclass
class LoadedModel:
    """A pipeline, its family, what to call it, and how it wants to be used.

    `training` are defaults for `TrainConfig` (`max_train_steps`, `learning_rate`, `rank`...), `roles` what differs from
    them in a blend's "content" or "style". `source` is where components can be loaded from again; a pipeline built in
    memory has none, and its encoders are then moved to the CPU, not freed.
    """

    pipeline: Any
    family: Family
    model_id: str
    defaults: GenerationDefaults
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])
    roles: Mapping[Literal["content", "style"], Mapping[str, Any]] = field(
        default_factory=dict[Literal["content", "style"], dict[str, Any]]
    )
    source: str | None = None
    dtype: torch.dtype = torch.float32
    _parked: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module], repr=False)

    @property
    def denoiser(self) -> Any:
        """The module that is adapted."""
        return self.family.denoiser(self.pipeline)

    def release_encoders(self, *, keep_pictures: bool = False) -> None:
        """Free the text encoders and, unless `keep_pictures`, the autoencoder."""
        names = self.family.text_components + (() if keep_pictures else self.family.picture_components)
        freed: list[weakref.ref[nn.Module]] = []
        for name in names:
            module = getattr(self.pipeline, name, None)
            if module is None:
                continue
            if self.source is None:
                self._parked[name] = module.to("cpu")
            else:
                freed.append(weakref.ref(module))
            setattr(self.pipeline, name, None)
            del module
        if any(reference() is not None for reference in freed):
            gc.collect()  # a third of a second, needed only where something made a cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def restore_encoders(self, device: str | torch.device | None = None) -> None:
        """Bring back what `release_encoders` freed, onto `device` (the denoiser's by default)."""
        names = self.family.text_components + self.family.picture_components
        missing = [name for name in names if getattr(self.pipeline, name, None) is None]
        device = device or self.denoiser.device
        if self.source is not None and missing:
            present = {name: part for name, part in self.pipeline.components.items() if name not in missing}
            loaded = _from_pretrained(self.source, self.dtype, type(self.pipeline), **present)
            for name in missing:
                setattr(self.pipeline, name, getattr(loaded, name))
        for name in missing:
            if name in self._parked:
                setattr(self.pipeline, name, self._parked.pop(name))
            getattr(self.pipeline, name).to(device)


def load_pipeline(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load a diffusers pipeline from a local folder (never asking the hub) or by hub id.

    Args:
        model: a folder with a `model_index.json`, or a hub id such as `black-forest-labs/FLUX.1-dev`.
        dtype: of every component's weights.
        device: where all components go.

    Raises:
        QrloraError: no such folder or hub model, a model that cannot be read, or of an unknown family.
    """
    source, settings = _local_folder(model), read_settings(model)
    pipeline = _from_pretrained(str(source or model), dtype, DiffusionPipeline)
    family = family_of(pipeline)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    pipeline.to(device)
    return LoadedModel(
        pipeline=pipeline,
        family=family,
        model_id=settings.name or str(model),
        defaults=_defaults(family, settings, str(model)),
        training={**family.training_defaults, **settings.training},
        roles=settings.roles,
        source=str(source or model),
        dtype=dtype,
    )


def read_settings(model: str | Path) -> ModelSettings:
    """What a model folder's `qrlora.json` says, without loading the model; nothing for a hub id.

    Raises:
        QrloraError: no such folder, or a file that cannot be read.
    """
    source = _local_folder(model)
    return ModelSettings() if source is None else _read_settings(source / SETTINGS_FILE)


def _local_folder(model: str | Path) -> Path | None:
    """The folder meant, or None for a hub id."""
    path = Path(model)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise QrloraError(f"{path} is no diffusers pipeline folder: it has no model_index.json.")
        return path
    if path.exists():
        raise QrloraError(f"{path} is a file; a model is a diffusers pipeline folder or a hub id.")
    parts = str(model).split("/")
    if isinstance(model, Path) or len(parts) > 2 or str(model).startswith((".", "~", "/")) or not all(parts):
        raise QrloraError(f"there is no model folder {model}; give a diffusers pipeline folder or a hub id.")
    return None


def _read_settings(path: Path) -> ModelSettings:
    if not path.is_file():
        return ModelSettings()
    try:
        return ModelSettings.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise QrloraError(f"{path}: {key}: {problem['msg']}") from error
    except (OSError, ValueError) as error:
        raise QrloraError(f"{path} cannot be read: {_first_line(error)}") from error


def _defaults(family: Family, settings: ModelSettings, model: str) -> GenerationDefaults:
    try:
        return GenerationDefaults.model_validate({**family.generation_defaults.model_dump(), **settings.generation})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise QrloraError(f"{SETTINGS_FILE} of {model}: generation.{key}: {problem['msg']}") from error


def _from_pretrained(source: str, dtype: torch.dtype, cls: type[Any], **components: Any) -> Any:
    local = Path(source).is_dir()
    try:
        with _no_loading_bars(), warnings.catch_warnings():
            # The libraries warn about each other's spellings while loading; none of it is the user's to mend.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # safetensors alone: nothing is ever unpickled
            return cls.from_pretrained(
                source, torch_dtype=dtype, local_files_only=local, use_safetensors=True, **components
            )
    except Exception as error:  # every library below raises its own kinds
        if local:
            raise QrloraError(f"the model folder {source} cannot be loaded: {_first_line(error)}") from error
        raise QrloraError(
            f"the model {source} is neither a local folder nor to be had from the hub ({_first_line(error)}); check "
            "its name, the network, and for a gated model that you are logged in (hf auth login)."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """No bars, and none of transformers' advice to install what is not needed here."""
    switches = []
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    for logging in (diffusers_logging, transformers_logging):
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            switches.append(logging.enable_progress_bar)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        for switch in switches:
            switch()
