"""From a hub id or a folder to a pipeline with its family and its defaults."""

import json
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from qrlora.errors import QrloraError
from qrlora.models._family import Family, GenerationDefaults
from qrlora.models._loaded import LoadedModel, Offload
from qrlora.models._quantization import Quantization, check_quantization
from qrlora.models._reading import first_line, from_pretrained, told
from qrlora.models._registry import family_of

SETTINGS_FILE = "qrlora.json"


class ModelSettings(BaseModel):
    """`qrlora.json` in a model folder; other keys are the folder's own business.

    Attributes:
        name: what the model is called.
        generation: how it wants its pictures made, as in `GenerationDefaults`.
        training: defaults for `TrainConfig`.
        roles: what differs from `training` in a blend's "content" or "style".
        weights: of a blend, as in `blend.weights`: `content`, `style`, `contents` (rows), `styles` (columns).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str | None = None
    generation: dict[str, Any] = {}
    training: dict[str, Any] = {}
    roles: dict[Literal["content", "style"], dict[str, Any]] = {}
    weights: dict[str, Any] = {}


def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantization: Quantization | None = None,
    offload: Offload = "none",
    encoder_offload: Offload = "none",
    denoiser: bool = True,
) -> LoadedModel:
    """Load a diffusers pipeline from a local folder (never asking the hub) or by hub id.

    Args:
        model: a folder with a `model_index.json`, or a hub id such as `black-forest-labs/FLUX.1-dev`.
        dtype: of every component's weights that are not quantised.
        device: where all components go.
        quantization: of the denoiser's blocks, as they are read: nf4 (bitsandbytes), int8 or fp8 (torchao).
        offload: "blocks" keeps the denoiser's blocks on the CPU, each on the device while it computes.
        encoder_offload: the same of the text encoders.
        denoiser: False leaves the weights of the denoiser to `LoadedModel.load_denoiser`, until when it is on the meta
            device.

    Raises:
        QrloraError: no such folder or hub model, a model that cannot be read, or of an unknown family.
    """
    check_quantization(quantization)
    source, settings = local_folder(model), read_settings(model)
    pipeline = from_pretrained(str(source or model), dtype, DiffusionPipeline, **_blank_denoiser(str(source or model)))
    family = family_of(pipeline)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    loaded = LoadedModel(
        pipeline=pipeline,
        family=family,
        model_id=settings.name or str(model),
        defaults=_defaults(family, pipeline, settings, str(model)),
        training={**family.training_defaults, **settings.training},
        roles=settings.roles,
        weights=settings.weights,
        source=str(source or model),
        dtype=dtype,
    )
    loaded.keep_as(quantization, offload, encoder_offload)
    loaded.place_encoders(device)
    if denoiser:
        loaded.load_denoiser(device)
    return loaded


def read_settings(model: str | Path) -> ModelSettings:
    """What a model folder's `qrlora.json` says, without loading the model; nothing for a hub id.

    Raises:
        QrloraError: no such folder, or a file that cannot be read.
    """
    source = local_folder(model)
    return ModelSettings() if source is None else _read_settings(source / SETTINGS_FILE)


def local_folder(model: str | Path) -> Path | None:
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
        raise QrloraError(f"{path} cannot be read: {first_line(error)}") from error


def _defaults(family: Family, pipeline: Any, settings: ModelSettings, model: str) -> GenerationDefaults:
    own = family.defaults_of(pipeline)
    try:
        defaults = GenerationDefaults.model_validate({**own.model_dump(), **settings.generation})
        family.check_settings(pipeline, defaults)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise QrloraError(f"{SETTINGS_FILE} of {model}: generation.{key}: {problem['msg']}") from error
    except QrloraError as error:
        raise QrloraError(f"{SETTINGS_FILE} of {model}: generation.{error}") from error
    return defaults


def _blank_denoiser(source: str) -> dict[str, nn.Module]:
    """The denoiser of its class and configuration, on the meta device: enough for everything but computing.

    Nothing for a class that diffusers does not have: it is then read like any component, and its family refused.
    """
    blank: dict[str, nn.Module] = {}
    index = told(source, lambda: DiffusionPipeline.load_config(source, local_files_only=Path(source).is_dir()))
    for name in ("transformer", "unet"):
        library, kind = index.get(name) or (None, "")
        found: Any = getattr(diffusers, str(kind), None) if library == "diffusers" else None
        if found is not None:
            blank[name] = told(source, lambda: _blank(found, source, name))  # noqa: B023  (called at once)
    return blank


def _blank(kind: Any, source: str, component: str) -> nn.Module:
    config = kind.load_config(source, subfolder=component, local_files_only=Path(source).is_dir())
    with torch.device("meta"):
        return kind.from_config(config)
