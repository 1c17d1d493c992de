"""What must hold before adapters can become one: same component, same layers, same base."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qrlora.basis import Side
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, basis_vectors, same_weight


def name_of(adapters: Sequence[Adapter], index: int) -> str:
    return adapters[index].source or f"adapter {index + 1}"


def check_compatible(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that are no LoRA, or of different components, layers, shapes or base models, naming the first.

    Raises:
        QrloraError: as said; also when a value is not finite.
    """
    for index, adapter in enumerate(adapters):
        adapter.check_low_rank("merged")
        _check_finite(name_of(adapters, index), adapter)
        if index:
            _check_same_layers(adapters, index)
            for earlier in range(index):
                _check_same_base(adapters, earlier, index)


def _check_finite(label: str, adapter: Adapter) -> None:
    for layer, pair in adapter.layers.items():
        if not (bool(torch.isfinite(pair.A).all()) and bool(torch.isfinite(pair.B).all())):
            raise QrloraError(f"{label}: {layer} has values that are not finite (nan or inf); it cannot be merged.")


def _check_same_layers(adapters: Sequence[Adapter], index: int) -> None:
    first, other = adapters[0], adapters[index]
    label, first_label = name_of(adapters, index), name_of(adapters, 0)
    if first.component != other.component:
        raise QrloraError(f"{label} adapts the {other.component}, but {first_label} the {first.component}.")
    for layer in first.layers:
        if layer not in other.layers:
            raise QrloraError(f"{label} does not adapt {layer}, which {first_label} does; only equal layers merge.")
    for layer, pair in other.layers.items():
        if layer not in first.layers:
            raise QrloraError(f"{label} adapts {layer}, which {first_label} does not; only equal layers merge.")
        if pair.shape != first.layers[layer].shape:
            raise QrloraError(
                f"{layer} adapts a weight of shape {list(pair.shape)} in {label} but "
                f"{list(first.layers[layer].shape)} in "
                f"{first_label}; they belong to different base models."
            )


def _check_same_base(adapters: Sequence[Adapter], earlier: int, index: int) -> None:
    first, other = adapters[earlier].header, adapters[index].header
    if first is None or other is None:
        return
    label, first_label = name_of(adapters, index), name_of(adapters, earlier)
    compared = False
    for layer in first.weight_hashes.keys() & other.weight_hashes.keys():
        same = same_weight(first.weight_hashes[layer], other.weight_hashes[layer])
        compared = compared or same is not None
        if same is False:
            raise QrloraError(
                f"{label} was trained on another base model than {first_label}: the weight of {layer} differs."
            )
    if not compared and first.base_model and other.base_model and first.base_model != other.base_model:
        raise QrloraError(
            f"{label} was trained on {other.base_model}, but {first_label} on {first.base_model}; only adapters of one "
            "base model merge."
        )


def basis_difference(adapters: Sequence[Adapter], tolerance: float) -> str | None:
    """Why the adapters do not share one stored basis; None when they do, to `tolerance` relative in every layer."""
    sides: list[Side] = []
    for index, adapter in enumerate(adapters):
        side = adapter.header.side if adapter.header is not None else None
        if side is None:
            return f"{name_of(adapters, index)} has no basis of its own (a plain LoRA or a concatenated merge)"
        sides.append(side)
        if side != sides[0]:
            return f"the bases of {name_of(adapters, 0)} and {name_of(adapters, index)} are on different sides"
    for layer in adapters[0].layers:
        stored = [basis_vectors(adapter.layers[layer].B, adapter.layers[layer].A, sides[0]) for adapter in adapters]
        for index, vectors in enumerate(stored[1:], start=1):
            pair = f"{name_of(adapters, 0)} and {name_of(adapters, index)}"
            if vectors.shape != stored[0].shape:
                return f"the ranks of {layer} differ between {pair} ({stored[0].shape[1]} and {vectors.shape[1]})"
            if not _relative_difference(stored[0], vectors) <= tolerance:
                return f"the bases of {layer} differ between {pair}"
    return None


def _relative_difference(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.double(), other.double()
    return float((other - reference).square().sum().sqrt() / reference.square().sum().sqrt())
