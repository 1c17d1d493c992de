"""A model without its weights: what its configuration files say, as modules on the meta device."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from qrlora.errors import QrloraError
from qrlora.models._family import Family
from qrlora.models._loading import ModelSettings, local_folder, read_settings
from qrlora.models._reading import told
from qrlora.models._registry import families

_SHIPPED = Path(__file__).with_name("configurations")
Configuration = Mapping[str, Any]


@dataclass(frozen=True)
class Blueprint:
    """A pipeline's components by their configurations; none of their weights are read.

    Attributes:
        model_id: what the model is called.
        family: its family.
        components: configuration by component, with `_class_name` (diffusers) or `architectures` (transformers).
        settings: what its `qrlora.json` says.
    """

    model_id: str
    family: Family
    components: Mapping[str, Configuration]
    settings: ModelSettings

    @property
    def training(self) -> dict[str, Any]:
        """The model's own training defaults."""
        return {**self.family.training_defaults, **self.settings.training}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a side to one of the latents."""
        return self.family.latent_scale(self.components["vae"])

    def build(self, component: str) -> nn.Module:
        """A component of its true class and shapes, in fp32 on the meta device.

        Raises:
            QrloraError: a class that the libraries do not have.
        """
        config = self.components[component]
        try:
            with torch.device("meta"):
                module = _of_diffusers(config) if "_class_name" in config else _of_transformers(config)
        except Exception as error:  # every library below raises its own kinds
            told_of = f"{component} of {self.model_id} cannot be built from its configuration"
            raise QrloraError(f"{told_of}: {error}") from error
        return module.requires_grad_(False).eval()

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, on the meta device."""
        return self.build(self.family.component)


def shipped_models() -> tuple[str, ...]:
    """Names of the full-size public configurations that come with qrlora."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.json")))


def read_blueprint(model: str | Path) -> Blueprint:
    """What a model is made of.

    Args:
        model: one of `shipped_models`, a diffusers folder, or a hub id, of which configuration files alone are fetched.

    Raises:
        QrloraError: no such model, or one of an unknown family.
    """
    if str(model) in shipped_models() and not Path(model).is_dir():
        told_of = json.loads((_SHIPPED / f"{model}.json").read_text(encoding="utf-8"))
        family = _family_named(told_of["pipeline"], str(model))
        return Blueprint(told_of["name"], family, told_of["components"], ModelSettings())
    try:
        local_folder(model)
    except QrloraError as error:
        raise QrloraError(f"{error} Known without files are {', '.join(shipped_models())}.") from error
    settings = read_settings(model)
    index = told(str(model), lambda: _index(str(model)))
    family = _family_named(str(index.get("_class_name")), str(model))
    wanted = (family.component, *family.text_components, *family.picture_components)
    components = {
        name: told(str(model), lambda name=name: _configuration(str(model), name, *index[name]))
        for name in wanted
        if index.get(name, [None])[0] is not None
    }
    return Blueprint(settings.name or str(model), family, components, settings)


def _index(source: str) -> Configuration:
    loaded: Any = DiffusionPipeline.load_config(source, local_files_only=Path(source).is_dir())
    return loaded


def _configuration(source: str, component: str, library: str, kind: str) -> Configuration:
    local = Path(source).is_dir()
    if library == "diffusers":
        return getattr(diffusers, kind).load_config(source, subfolder=component, local_files_only=local)
    config = PretrainedConfig.get_config_dict(source, subfolder=component, local_files_only=local)[0]
    # The pipeline's class is the one that is loaded. A pipeline's own, such as the safety checker, is none of
    # transformers for all that it is configured like one.
    module = library if library == "transformers" else f"diffusers.pipelines.{library}"
    return {**config, "architectures": [kind], "_module": module}


def _of_diffusers(config: Configuration) -> Any:
    return getattr(diffusers, config["_class_name"]).from_config(dict(config))


def _of_transformers(config: Configuration) -> Any:
    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "_module")}
    module, kind = config.get("_module", "transformers"), config["architectures"][0]
    return getattr(import_module(module), kind)(AutoConfig.for_model(config["model_type"], **settings))


def _family_named(pipeline: str, model: str) -> Family:
    found: Any = getattr(import_module("diffusers"), pipeline, None)
    names = {parent.__name__ for parent in found.__mro__} if found is not None else {pipeline}
    for family in families():
        if family.pipeline_class in names:
            return family
    known = ", ".join(sorted(family.pipeline_class for family in families()))
    raise QrloraError(f"{model} is a {pipeline}, which belongs to no model family known here; there are {known}.")
