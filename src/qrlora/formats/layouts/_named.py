"""Writing by original names: which family an adapter is of, and its pairs by the original code's layers."""

from collections.abc import Mapping
from typing import get_args

from qrlora.errors import QrloraError
from qrlora.formats._adapter import TEXT_ENCODERS, Adapter, LowRank
from qrlora.formats.keys import TABLES, Family, KeyTable, Target
from qrlora.formats.layouts._fused import fuse


def original_layers(adapter: Adapter, family: Family | None) -> tuple[Family, dict[str, LowRank]]:
    """The adapter's pairs by original layer (`double_blocks.0.img_attn.qkv`), fused where that layer is.

    Args:
        adapter: a plain low-rank adapter.
        family: whose names; None finds it by the layers that one family alone has.

    Raises:
        QrloraError: a layer that has no name there, or a family that the layers do not tell.
    """
    adapter.check_low_rank("exported as a LoRA")
    if adapter.component in TEXT_ENCODERS:
        raise QrloraError(f"{adapter.label} adapts text encoders alone, which only diffusers' layout can hold here.")
    table = _table(adapter, family)
    targets: dict[str, Target] = {}
    parts: dict[str, dict[str, LowRank]] = {}
    for path, pair in adapter.layers.items():
        held = table.by_path(path)
        if held is None:
            raise QrloraError(
                f"{adapter.label} adapts {path}, which has no name in the original code of {table.family}; export it "
                "as diffusers or peft, or say which --family it is of."
            )
        target, _ = held
        targets[target.name] = target
        parts.setdefault(target.name, {})[path] = pair
    return table.family, {name: fuse(target, parts[name]) for name, target in targets.items()}


def _table(adapter: Adapter, family: Family | None) -> KeyTable:
    if family is not None and family not in get_args(Family):
        raise QrloraError(f"family {family!r} is not known; use one of {', '.join(get_args(Family))}.")
    wanted = family or _family(adapter)
    return next(table for table in TABLES if table.family == wanted)


def _family(adapter: Adapter) -> Family:
    """By what FLUX or SD3 alone has: their double blocks have the same names in diffusers."""
    if adapter.component == "unet":
        return "sdxl"
    paths = adapter.layers
    if any(path.startswith("single_transformer_blocks.") for path in paths):
        return "flux"
    if any(".attn2." in path or path.startswith("pos_embed.") for path in paths) or _ends_without_text(paths):
        return "sd3"
    raise QrloraError(
        f"{adapter.label} adapts layers that FLUX and Stable Diffusion 3 both have, so their original names are not "
        "known; say --family flux or --family sd3."
    )


def _ends_without_text(paths: Mapping[str, LowRank]) -> bool:
    """Whether the last block takes text in but gives none out, as SD3's does and FLUX's does not."""
    taking = {int(path.split(".")[1]) for path in paths if path.endswith((".add_q_proj", ".add_k_proj", ".add_v_proj"))}
    giving = {int(path.split(".")[1]) for path in paths if path.endswith(".to_add_out")}
    return bool(giving) and max(taking, default=-1) > max(giving)
