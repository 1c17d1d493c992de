"""Text encoders that are trained too: their adapters, and prompts that they read anew in every step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qrlora.adapter import (
    BasisCache,
    add_adapter,
    attach_adapter,
    ranks_of,
    set_adapters,
    target_layers,
    trainable_parameters,
)
from qrlora.data import Encoded
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, Component, read_adapter
from qrlora.models import Family, LoadedModel
from qrlora.training.checkpoint import Checkpoint
from qrlora.training.config import TrainConfig
from qrlora.training.objective import Draw
from qrlora.training.setup import ADAPTER_NAME, Place

_WAY_OUT = "start from the denoiser's part alone (in Python, read_adapter(path).alone().save(...))"


def trained_encoders(config: TrainConfig, model: LoadedModel) -> tuple[Component, ...]:
    """The text encoders that this run trains.

    Raises:
        QrloraError: the model has none that can be.
    """
    if not config.train_text_encoder:
        return ()
    family = model.family
    missing = [name for name in family.trainable_encoders if getattr(model.pipeline, name, None) is None]
    if missing or not family.trainable_encoders:
        raise QrloraError(
            f"train_text_encoder: {model.model_id} ({family.name}) has no {' and '.join(missing) or 'CLIP encoder'} to "
            "train; drop it."
        )
    return family.trainable_encoders


def check_initial(config: TrainConfig, adapter: Adapter) -> None:
    """Refuse to start from an adapter of which a part would be lost.

    Raises:
        QrloraError: as said.
    """
    if adapter.companions and not config.train_text_encoder:
        raise QrloraError(
            f"init_from: {config.init_from} has an adapter of {' and '.join(adapter.companions)} too; set "
            f"train_text_encoder: true, or {_WAY_OUT}."
        )


def add_words(
    config: TrainConfig,
    model: LoadedModel,
    encoders: Sequence[Component],
    start: Checkpoint | None,
    cache: BasisCache | None,
    place: Place,
) -> dict[str, nn.Parameter]:
    """Put an adapter on each encoder, alone active, and return what is trained, by component and name.

    A resumed run takes what the checkpoint has. `init_from` is gone on with where it has an encoder's adapter.
    """
    spec = config.adapter.model_copy(update={"target_modules": "auto", "blocks": None})
    given = start.adapter if start is not None else config.init_from
    companions = read_adapter(given).companions if given is not None and encoders else {}
    parameters: dict[str, nn.Parameter] = {}
    for component in encoders:
        encoder, companion = model.keep_whole(component, place.device), companions.get(component)
        if companion is None:
            add_adapter(encoder, spec, ADAPTER_NAME, cache=cache)
        else:
            if start is None:
                _check_companion(config, encoder, companion)
            attach_adapter(encoder, companion, ADAPTER_NAME, trainable=True, spec=spec, cache=cache)
        set_adapters(encoder, {ADAPTER_NAME: 1.0})
        own = trainable_parameters(encoder, ADAPTER_NAME)
        parameters |= {f"{component}.{name}": parameter for name, parameter in own.items()}
    return parameters


def _check_companion(config: TrainConfig, encoder: nn.Module, companion: Adapter) -> None:
    spec, ranks = config.adapter, ranks_of(companion)
    if ranks != {spec.rank}:
        raise QrloraError(
            f"init_from: {config.init_from} has rank {', '.join(map(str, sorted(ranks)))} for {companion.component}, "
            f"but adapter.rank is {spec.rank}; make them equal, or {_WAY_OUT}."
        )
    header = companion.header
    if header is not None and not spec.plain and header.mask != spec.mask:
        raise QrloraError(
            f"init_from: {config.init_from} has mask {header.mask!r} for {companion.component}, but adapter.mask is "
            f"{spec.mask!r}; make them equal, or {_WAY_OUT}."
        )
    if odd := sorted(set(companion.layers) ^ set(target_layers(encoder))):
        verb = "adapts" if odd[0] in companion.layers else "does not adapt"
        raise QrloraError(
            f"init_from: {config.init_from} {verb} {odd[0]} of {companion.component}, other than training does; "
            f"{_WAY_OUT}."
        )


@dataclass(frozen=True)
class Words:
    """The encoders as they are being trained."""

    family: Family
    pipeline: Any
    device: torch.device

    @property
    def encoders(self) -> tuple[nn.Module, ...]:
        """The modules themselves."""
        return tuple(getattr(self.pipeline, name) for name in self.family.trainable_encoders)

    def read(self, encoded: Encoded, drawn: Draw) -> tuple[Encoded, Draw]:
        """The batch, with its captions read again, each once.

        Returns:
            `encoded` with the conditioning of these captions alone, and `drawn` with captions that are rows of it.
        """
        rows, captions = torch.unique(drawn.captions, return_inverse=True)
        cached = {key: every[rows].to(self.device) for key, every in encoded.conditioning.items()}
        now = self.family.encode_again(self.pipeline, [encoded.captions[row] for row in rows.tolist()], cached)
        conditioning: dict[str, Tensor] = {key: value.to(cached[key].dtype) for key, value in now.items()}
        return replace(encoded, conditioning=conditioning), replace(drawn, captions=captions)
