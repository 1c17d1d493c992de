"""A pipeline in memory: which of its parts are there, where, and how they are kept."""

import gc
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from qrlora.errors import QrloraError
from qrlora.models._family import Family, GenerationDefaults
from qrlora.models._quantization import (
    Quantization,
    check_quantization,
    own_quantisers,
    prepare_for_training,
    quantization_config,
)
from qrlora.models._reading import from_pretrained
from qrlora.models._streaming import BlockStream

Offload = Literal["none", "blocks"]


@dataclass
class LoadedModel:
    """A pipeline, its family, what to call it, and how it wants to be used.

    `training` are defaults for `TrainConfig` (`max_train_steps`, `learning_rate`, `rank`...), `roles` what differs from
    them in a blend's "content" or "style", `weights` those of a blend. `source` is where components can be loaded from
    again; a pipeline built in memory has none, and its encoders are then moved to the CPU, not freed, as with
    `park_encoders`.

    With `offload: blocks` the denoiser's blocks stay on the CPU and are on the device one after the other, with
    `encoder_offload` those of the text encoders; `quantization` is that of the denoiser.
    """

    pipeline: Any
    family: Family
    model_id: str
    defaults: GenerationDefaults
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])
    roles: Mapping[Literal["content", "style"], Mapping[str, Any]] = field(
        default_factory=dict[Literal["content", "style"], dict[str, Any]]
    )
    weights: Mapping[str, Any] = field(default_factory=dict[str, Any])
    source: str | None = None
    dtype: torch.dtype = torch.float32
    quantization: Quantization | None = None
    offload: Offload = "none"
    encoder_offload: Offload = "none"
    park_encoders: bool = False
    _parked: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module], repr=False)
    _released: set[str] = field(default_factory=set[str], repr=False)
    _streams: dict[str, BlockStream] = field(default_factory=dict[str, BlockStream], repr=False)

    @property
    def denoiser(self) -> Any:
        """The module that is adapted; on the meta device, of its class and configuration alone, until it is loaded."""
        return self.family.denoiser(self.pipeline)

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes; "meta" until it is loaded."""
        stream = self._streams.get(self.family.component)
        return torch.device(self.denoiser.device) if stream is None else stream.device

    def keep_as(self, quantization: Quantization | None, offload: Offload, encoder_offload: Offload) -> None:
        """Say how weights that are still to be read are to be kept; see `load_pipeline`.

        Raises:
            QrloraError: a quantisation that cannot be had, or of a model that is quantised already.
        """
        check_quantization(quantization)
        if quantization is not None and self.denoiser.config.get("quantization_config") is not None:
            raise QrloraError(f"the denoiser of {self.model_id} is quantised already; leave quantization out.")
        self.quantization, self.offload, self.encoder_offload = quantization, offload, encoder_offload

    def load_denoiser(self, device: str | torch.device) -> None:
        """Read the denoiser's weights, quantised as they are read, and put it where it computes.

        Nothing is read where it is there already.

        Args:
            device: where it computes; with `offload: blocks`, its blocks stay on the CPU all the same.

        Raises:
            QrloraError: weights that cannot be read, or a quantisation that cannot be had.
        """
        component = self.family.component
        if self.denoiser.device.type == "meta":
            assert self.source is not None
            blank, device = self.denoiser, torch.device(device)
            extra: dict[str, Any] = {"subfolder": component}
            if self.quantization is not None:
                extra["quantization_config"] = quantization_config(self.quantization, self.dtype)
            with own_quantisers(device):
                denoiser = from_pretrained(self.source, self.dtype, type(blank), **extra)
            if getattr(denoiser, "hf_quantizer", None) is not None:
                prepare_for_training(denoiser)
            setattr(self.pipeline, component, denoiser.requires_grad_(False).eval())
        self._place(component, device, self.offload)

    def settle(self) -> None:
        """After adapters were added: put them where their component computes, if its blocks are elsewhere."""
        for stream in self._streams.values():
            stream.settle()

    def enable_gradient_checkpointing(self) -> None:
        """diffusers' own; streamed blocks are computed again anyway, so they are left out of it."""
        self.denoiser.enable_gradient_checkpointing()
        if (stream := self._streams.get(self.family.component)) is not None:
            stream.take_over_checkpointing()

    def place_encoders(self, device: str | torch.device) -> None:
        """Put the text encoders and the autoencoder where they compute."""
        for name in self.family.text_components:
            self._place(name, device, self.encoder_offload)
        for name in self.family.picture_components:
            self._place(name, device, "none")

    def _place(self, name: str, device: str | torch.device, offload: Offload) -> None:
        module, device = getattr(self.pipeline, name, None), torch.empty(0, device=device).device
        if module is None:  # T5 may be left out
            return
        stream = self._streams.get(name)
        if stream is not None and stream.device == device:
            stream.settle()
        elif offload == "blocks":
            if stream is not None:
                stream.remove()
            self._streams[name] = BlockStream(module.requires_grad_(False).to("cpu"), device)
        else:
            module.to(device)

    def keep_whole(self, name: str, device: str | torch.device) -> nn.Module:
        """A text encoder all of which is where it computes, whatever `encoder_offload` says."""
        if (stream := self._streams.pop(name, None)) is not None:
            stream.remove()
        return getattr(self.pipeline, name).to(device)

    def release_encoders(self, *, keep_pictures: bool = False, keep: Collection[str] = ()) -> None:
        """Free the text encoders and, unless `keep_pictures`, the autoencoder.

        Args:
            keep_pictures: keep the autoencoder.
            keep: components that stay besides. Those with adapters go to the CPU instead of being freed.
        """
        names = self.family.text_components + (() if keep_pictures else self.family.picture_components)
        names = tuple(name for name in names if name not in keep)
        freed: list[weakref.ref[nn.Module]] = []
        for name in names:
            module = getattr(self.pipeline, name, None)
            if module is None:
                continue
            stream = self._streams.pop(name, None)
            if stream is not None:
                stream.remove()
            if self.source is None or self.park_encoders or getattr(module, "peft_config", None):
                self._parked[name] = module.to("cpu")
            else:
                freed.append(weakref.ref(module))
            setattr(self.pipeline, name, None)
            self._released.add(name)
            del stream
            del module
        if any(reference() is not None for reference in freed):
            gc.collect()  # a third of a second, needed only where something made a cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def restore_encoders(self, device: str | torch.device | None = None) -> None:
        """Bring back what `release_encoders` freed, onto `device` (the denoiser's by default)."""
        for name in list(self._parked):
            setattr(self.pipeline, name, self._parked.pop(name))
            self._released.discard(name)
        missing = sorted(self._released)  # not what the pipeline never had, such as a T5 left out
        place = device or self.device
        if self.source is not None and missing:
            present = {name: part for name, part in self.pipeline.components.items() if name not in missing}
            loaded = from_pretrained(self.source, self.dtype, type(self.pipeline), **present)
            for name in missing:
                module = getattr(loaded, name)
                setattr(self.pipeline, name, None if module is None else module.requires_grad_(False).eval())
        self._released.clear()
        self.place_encoders(place)
