"""Merges of adapters that differ in their layers: each layer is merged over the adapters that have it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from qrlora.adapter import Blocks, layers_in
from qrlora.formats import Adapter, LowRank, all_layers, shapes_of, some_layers
from qrlora.merging._header import merged_header

WHOLE = "all"
Group = Callable[[Sequence[Adapter], Sequence[float]], Adapter]


def restricted(adapter: Adapter, blocks: Blocks) -> Adapter:
    """The adapter on its layers within some blocks alone, its companions whole; "all" keeps it as it is.

    Raises:
        QrloraError: the blocks hold none of its layers.
    """
    if blocks == WHOLE:
        return adapter
    return _on(adapter, layers_in(blocks, adapter.layers))


def merge_by_layers(adapters: Sequence[Adapter], weights: Sequence[float], merge_group: Group) -> Adapter:
    """The union of the adapters' layers, the layers that the same adapters have merged together.

    Args:
        adapters: compatible but for their layers.
        weights: one an adapter.
        merge_group: merges adapters of equal layers.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for layer in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        owners = tuple(index for index, adapter in enumerate(adapters) if layer in adapter.layers)
        groups.setdefault(owners, []).append(layer)
    if len(groups) == 1:
        return merge_group(adapters, weights)
    parts: list[Mapping[str, LowRank]] = []
    methods: list[str] = []
    for owners, names in groups.items():
        merged = merge_group([_on(adapters[index], names) for index in owners], [weights[index] for index in owners])
        parts.append(merged.layers)
        if len(owners) > 1 and merged.header is not None and merged.header.method is not None:
            methods.append(merged.header.method)
    rank = max(pair.rank for part in parts for pair in shapes_of(part).values())
    # No two adapters met where the parts are disjoint: side by side is what happened.
    method = methods[0] if len(set(methods)) == 1 else "concat"
    header = merged_header(adapters, weights, method, rank=rank, keep_basis=False)
    return Adapter(all_layers(parts), header, adapters[0].component)


def _on(adapter: Adapter, names: Sequence[str]) -> Adapter:
    layers = some_layers(adapter.layers, names)
    header = adapter.header
    if header is not None:
        hashes = {name: value for name, value in header.weight_hashes.items() if name in layers}
        header = header.model_copy(update={"weight_hashes": hashes, "base_hash": None, "fingerprint": None})
    own = {name: adapter.own[name] for name in names if name in adapter.own}
    return replace(adapter, layers=layers, header=header, own=own)
