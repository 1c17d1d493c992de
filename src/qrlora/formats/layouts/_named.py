"""Writing by original names: which family an adapter is of, and its pairs by the original code's layers."""

from collections.abc import Mapping

from qrlora.errors import QrloraError
from qrlora.formats._adapter import TEXT_ENCODERS, Adapter, LowRank
from qrlora.formats._layers import LayersOnDemand, blank
from qrlora.formats.keys import TABLES, KeyTable, Target, table_of
from qrlora.formats.layouts._fused import fuse

_TAKING = (".add_k_proj", ".add_v_proj", ".add_q_proj")
# Stable Diffusion 3.5-large, which has most of those that share their names, has 38.
_MANY_BLOCKS = 38


def original_layers(
    adapter: Adapter, family: str | None, *, kohya: bool = False
) -> tuple[KeyTable, Mapping[str, LowRank]]:
    """The adapter's pairs by original layer (`double_blocks.0.img_attn.qkv`), fused where that layer is.

    Those of an adapter with layers on demand are on demand, too; the ranks of fused layers depend on values, so such
    layers are read twice.

    Args:
        adapter: a plain low-rank adapter.
        family: whose names; None finds it by the layers that one family alone has.
        kohya: by the names that kohya's tools give them, which may be diffusers'.

    Raises:
        QrloraError: a layer that has no name there, or a family that the layers do not tell.
    """
    adapter.check_low_rank("exported as a LoRA")
    if adapter.component in TEXT_ENCODERS:
        raise QrloraError(f"{adapter.label} adapts text encoders alone, which only diffusers' layout can hold here.")
    table = _table(adapter) if family is None else table_of(family)
    targets: dict[str, Target] = {}
    parts: dict[str, list[str]] = {}
    for path in adapter.layers:
        held = table.by_path(path)
        if held is None:
            raise QrloraError(
                f"{adapter.label} adapts {path}, which has no name in the original code of {table.family}; export it "
                "as diffusers or peft, or say which --family it is of."
            )
        target, _ = held
        targets[target.name] = target
        parts.setdefault(target.name, []).append(path)
    if kohya and table.kohya_by_path:
        return table, adapter.layers

    def fused(name: str) -> LowRank:
        return fuse(targets[name], {path: adapter.layers[path] for path in parts[name]})

    if isinstance(adapter.layers, LayersOnDemand):
        return table, LayersOnDemand({name: blank(fused(name)) for name in targets}, fused)
    return table, {name: fused(name) for name in targets}


def _table(adapter: Adapter) -> KeyTable:
    """The family that knows most of the layers, and of several such, which share names, the one they tell."""
    known = {
        table: sum(table.by_path(path) is not None for path in adapter.layers)
        for table in TABLES
        if table.component == adapter.component
    }
    most = max(known.values())
    if not most:
        raise QrloraError(
            f"{adapter.label} adapts {next(iter(adapter.layers))}, which has no name in the original code of any "
            "family known here; export it as diffusers or peft."
        )
    candidates = {table.family: table for table, count in known.items() if count == most}
    if len(candidates) > 1:
        told = _u_net(adapter) if adapter.component == "unet" else _joint(adapter.layers)
        if told not in candidates:
            *others, last = sorted(candidates)
            raise QrloraError(
                f"{adapter.label} adapts layers that {', '.join(others)} and {last} share, so their original names "
                f"are not known; say {', '.join(f'--family {name}' for name in others)} or --family {last}."
            )
        return candidates[told]
    return next(iter(candidates.values()))


def _joint(layers: Mapping[str, LowRank]) -> str:
    """Of the families with joint blocks, the one that has so many, or whose last block has no layer for its text."""
    if max(map(_block, layers)) >= _MANY_BLOCKS:
        return "qwen-image"
    asking, taking, giving = (_last(layers, *ends) for ends in ((".add_q_proj",), _TAKING, (".to_add_out",)))
    if 0 <= giving < taking:
        # The last block's text comes to nothing: SD3 has no layer for it, and of Qwen-Image none is adapted.
        return "sd3" if asking == taking else "qwen-image"
    return ""


def _u_net(adapter: Adapter) -> str:
    """By the width of the text that they read, or by blocks of more than one layer of attention, as in SDXL alone."""
    for path, pair in adapter.layers.items():
        if path.endswith((".attn2.to_k", ".attn2.to_v")) and pair.A.shape[1] in (768, 1024, 2048):
            return "sdxl" if pair.A.shape[1] == 2048 else "sd15"
    deeper = any(".transformer_blocks." in path and ".transformer_blocks.0." not in path for path in adapter.layers)
    return "sdxl" if deeper else ""


def _block(path: str) -> int:
    """Number of the joint block that a layer is in; -1 where in none."""
    first, _, rest = path.partition(".")
    return int(rest.partition(".")[0]) if first == "transformer_blocks" else -1


def _last(paths: Mapping[str, LowRank], *ends: str) -> int:
    """The last joint block with a layer of that name; -1 without one."""
    return max((_block(path) for path in paths if path.endswith(ends)), default=-1)
