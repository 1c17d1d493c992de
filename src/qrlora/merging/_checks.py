"""What must hold before adapters can become one: same component, same layers, same base."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qrlora.basis import Side
from qrlora.errors import QrloraError
from qrlora.formats import TEXT_ENCODERS, Adapter, Component, basis_vectors, same_weight


def name_of(adapters: Sequence[Adapter], index: int) -> str:
    return adapters[index].source or f"adapter {index + 1}"


def companions_of(adapters: Sequence[Adapter], component: Component) -> dict[int, Adapter]:
    """The adapters' companions for a text encoder by index, each under the name of the adapter it belongs to."""
    return {
        index: replace(adapter.companions[component], source=f"{name_of(adapters, index)} ({component})")
        for index, adapter in enumerate(adapters)
        if component in adapter.companions
    }


def check_compatible(adapters: Sequence[Adapter], *, equal_layers: bool = True) -> None:
    """Refuse adapters that are no LoRA, or of different components, layers, shapes or base models, naming the first.

    Without `equal_layers`, only the layers that two of them share are compared, as always between companions.

    Raises:
        QrloraError: as said; also when a value is not finite.
    """
    for index, adapter in enumerate(adapters):
        adapter.check_low_rank("merged")
        _check_finite(name_of(adapters, index), adapter)
        if index:
            for earlier in range(index):
                _check_same_layers(adapters, earlier, index, equal_layers)
                _check_same_base(adapters, earlier, index)
    for component in TEXT_ENCODERS:
        theirs = companions_of(adapters, component)
        if theirs:
            check_compatible(list(theirs.values()), equal_layers=False)


def _check_finite(label: str, adapter: Adapter) -> None:
    for layer, pair in adapter.layers.items():
        if not (bool(torch.isfinite(pair.A).all()) and bool(torch.isfinite(pair.B).all())):
            raise QrloraError(f"{label}: {layer} has values that are not finite (nan or inf); it cannot be merged.")


def _check_same_layers(adapters: Sequence[Adapter], earlier: int, index: int, equal_layers: bool) -> None:
    first, other = adapters[earlier], adapters[index]
    label, first_label = name_of(adapters, index), name_of(adapters, earlier)
    if first.component != other.component:
        raise QrloraError(f"{label} adapts the {other.component}, but {first_label} the {first.component}.")
    odd = first.layers.keys() ^ other.layers.keys()
    if odd and equal_layers:
        layer = next(name for name in (*first.layers, *other.layers) if name in odd)
        verbs = ("adapts", "does not") if layer in other.layers else ("does not adapt", "does")
        raise QrloraError(
            f"{label} {verbs[0]} {layer}, which {first_label} {verbs[1]}; only equal layers merge, unless blocks say "
            "which part of each is meant (blocks='all' for the whole)."
        )
    for layer, pair in other.layers.items():
        if layer in first.layers and pair.shape != first.layers[layer].shape:
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
