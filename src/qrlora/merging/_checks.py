"""What must hold before adapters can become one: same component, same layers, same base."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qrlora.basis import Side
from qrlora.errors import QrloraError
from qrlora.formats import TEXT_ENCODERS, Adapter, Component, LowRank, basis_vectors, same_weight


class BasesDifferError(QrloraError):
    """Of adapters of one component that were to be summed, and do not share one basis."""

    def __init__(self, message: str, component: Component) -> None:
        super().__init__(message)
        self.component = component


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

    No values are looked at; `surveyed` does that. Without `equal_layers`, only the layers that two of them share are
    compared, as always between companions.

    Raises:
        QrloraError: as said.
    """
    for index, adapter in enumerate(adapters):
        adapter.check_low_rank("merged")
        for earlier in range(index):
            _check_same_layers(adapters, earlier, index, equal_layers)
            _check_same_base(adapters, earlier, index)
    for component in TEXT_ENCODERS:
        theirs = companions_of(adapters, component)
        if theirs:
            check_compatible(list(theirs.values()), equal_layers=False)


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
    for layer, pair in other.shapes.items():
        if layer in first.shapes and pair.shape != first.shapes[layer].shape:
            raise QrloraError(
                f"{layer} adapts a weight of shape {list(pair.shape)} in {label} but "
                f"{list(first.shapes[layer].shape)} in "
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


def basis_difference(
    adapters: Sequence[Adapter], tolerance: float, known: Mapping[str, Sequence[float]] | None = None
) -> str | None:
    """Why the adapters do not share one stored basis; None when they do, to `tolerance` relative in every layer.

    Args:
        adapters: of equal layers.
        tolerance: relative to the first one's basis.
        known: `basis_differences` by layer, where they were worked out already.
    """
    side, reason = common_side(adapters)
    if side is None:
        return reason
    for layer in adapters[0].layers:
        reason = layer_difference(
            adapters,
            layer,
            known[layer]
            if known is not None
            else basis_differences([adapter.layers[layer] for adapter in adapters], side),
            tolerance,
        )
        if reason is not None:
            return reason
    return None


def common_side(adapters: Sequence[Adapter]) -> tuple[Side | None, str]:
    """The side of all adapters' bases, by their headers; None, and why, where they have no side in common."""
    sides: list[Side] = []
    for index, adapter in enumerate(adapters):
        side = adapter.header.side if adapter.header is not None else None
        if side is None:
            return None, f"{name_of(adapters, index)} has no basis of its own (a plain LoRA or a concatenated merge)"
        sides.append(side)
        if side != sides[0]:
            return None, f"the bases of {name_of(adapters, 0)} and {name_of(adapters, index)} are on different sides"
    return sides[0], ""


def basis_differences(pairs: Sequence[LowRank], side: Side) -> list[float]:
    """How far each basis of a layer is from the first one's, relative to it; nan where the ranks differ."""
    stored = [basis_vectors(pair.B, pair.A, side) for pair in pairs]
    return [_relative_difference(stored[0], vectors) for vectors in stored[1:]]


def layer_difference(
    adapters: Sequence[Adapter], layer: str, differences: Sequence[float], tolerance: float
) -> str | None:
    """Why the bases of one layer are not the same; None where they are."""
    for index, difference in enumerate(differences, start=1):
        pair = f"{name_of(adapters, 0)} and {name_of(adapters, index)}"
        ranks = [adapters[which].shapes[layer].rank for which in (0, index)]
        if ranks[0] != ranks[1]:
            return f"the ranks of {layer} differ between {pair} ({ranks[0]} and {ranks[1]})"
        if not difference <= tolerance:
            return f"the bases of {layer} differ between {pair}"
    return None


def _relative_difference(reference: Tensor, other: Tensor) -> float:
    if reference.shape != other.shape:
        return math.nan
    if reference.data_ptr() == other.data_ptr() and reference.stride() == other.stride():
        return 0.0
    if torch.equal(reference, other):
        return 0.0
    reference, other = reference.double(), other.double()
    return float((other - reference).square().sum().sqrt() / reference.square().sum().sqrt())
