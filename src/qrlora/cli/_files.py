"""What an adapter file of another tool may not say of itself, as options."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor

    from qrlora.formats import WeightSource


class FileOptions(BaseModel):
    """Options of the verbs that read one adapter file of any tool."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    basis: Literal["qr", "svd", "ica", "moe"] | None = None
    """For files of the published code's fork for Stable Diffusion 3: what they were trained with."""
    lora_alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """For files of the published code and its fork: the alpha they were trained with. None means the rank."""
    top_k: int | None = Field(default=None, gt=0)
    """For Freq-MoE files of that fork: how many experts act on a token. None means all."""
    model: str | None = None
    """For files of Q and R trained together, which need their base model: its folder or hub id."""
    layout: str | None = None
    """For a file whose keys fit several layouts: the name of the right one."""


def base_weights(model: str | None) -> "WeightSource | None":
    """The weights of a local diffusers folder, read one at a time; of a hub id, from the loaded pipeline."""
    from qrlora.formats import weight_source

    if model is None or Path(model).exists():
        return None if model is None else weight_source(model)
    from qrlora.adapter import adaptable_layers, dense_weight
    from qrlora.errors import QrloraError
    from qrlora.models import load_pipeline

    modules = adaptable_layers(load_pipeline(model).denoiser)

    def weight(layer: str) -> "Tensor":
        if layer not in modules:
            raise QrloraError(f"{model} has no layer {layer}; give the base model that the adapter was trained on.")
        return dense_weight(modules[layer], layer).cpu()

    return weight
