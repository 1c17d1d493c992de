"""Provenance of a merged adapter."""

from collections.abc import Sequence
from typing import Any

from qrlora.formats import Adapter, Header


def merged_header(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str, *, rank: int, keep_basis: bool
) -> Header:
    """The header of a merge: what the parts share, what each was, and its weight.

    Args:
        adapters: the parts, with or without headers.
        weights: one a part.
        method: name of the merge method.
        rank: largest rank over the merged layers.
        keep_basis: whether the merged adapter still has the parts' basis.
    """
    headers = [adapter.header for adapter in adapters]
    known = [header for header in headers if header is not None]
    first = known[0] if known else None
    words = dict.fromkeys(word for header in known for word in header.trigger_words)
    hashes: dict[str, str] = {}
    for header in known:
        for layer, value in header.weight_hashes.items():
            hashes.setdefault(layer, value)
    kept: dict[str, Any] = {}
    if keep_basis and first is not None:
        masks = {header.mask for header in known}
        kept = {
            "basis": first.basis,
            "side": first.side,
            "band": first.band,
            "seed": first.seed,
            "fingerprint": first.fingerprint,
            "mask": first.mask if len(masks) == 1 else "full",
        }
    return Header(
        rank=rank,
        lora_alpha=rank,
        base_model=next((header.base_model for header in known if header.base_model), None),
        base_hash=next((header.base_hash for header in known if header.base_hash), None),
        weight_hashes=hashes,
        trigger_words=list(words),
        method=method,
        merged_from=[_part(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)],
        **kept,
    )


def _part(adapter: Adapter, weight: float) -> dict[str, Any]:
    """One part's own story, without the hashes, which the merged header has once."""
    part: dict[str, Any] = {"weight": weight}
    if adapter.header is not None:
        part |= adapter.header.model_dump(mode="json", exclude={"weight_hashes"}, exclude_none=True)
    return part
