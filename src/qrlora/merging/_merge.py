"""Adapters into one adapter."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qrlora.adapter import Blocks
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import TEXT_ENCODERS, Adapter, Component, check_weight
from qrlora.merging._checks import basis_difference, check_compatible, companions_of
from qrlora.merging._norms import equal_norm_scales, warn_of_unequal_norms
from qrlora.merging._parts import merge_by_layers, restricted
from qrlora.merging._registry import for_text_encoders, run
from qrlora.merging._survey import Survey, surveyed

BASIS_TOLERANCE = 1e-5


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "auto",
    *,
    blocks: Sequence[Blocks] | None = None,
    normalize: bool = False,
    **options: Any,
) -> Adapter:
    """Merge any number of adapters of one base model, `dW = sum_i weights[i] * dW_i`.

    Adapters of unequal norms are told of in a `QrloraWarning` where the largest norm times weight is more than
    `NORM_RATIO_LIMIT` times the smallest (a weight of 0 leaves an adapter out of that).

    Adapters that were read lazily are looked at once, layer by layer. `sum` and `concat` of them have layers that are
    computed when they are asked for, so saving the merge holds one layer at a time and equals, bit for bit, the merge
    of loaded adapters. The other methods read a layer at a time too, but hold their result; knots holds all updates in
    its common frames, and orthogonal reads three times.

    Companions (adapters of text encoders) are merged like the denoiser's, each component by itself. A companion, or a
    layer of one, that an adapter does not have is zero there.

    Args:
        adapters: at least one; all of the same layers of the denoiser, unless `blocks` are given.
        weights: one finite number an adapter, any sign; all 1 where None.
        method: "sum" (one stored basis: exact at rank r), "concat" (any bases: exact at the summed rank), another
            registered method, or "auto": sum if the stored bases agree to 1e-5, otherwise concat, with a
            `QrloraWarning`. For companions "sum" is "auto".
        blocks: which part of each adapter is meant, one an adapter: "all", a preset ("b-lora-content"), a range, a
            regular expression or a list of them (see `qrlora.adapter.blocks`). A layer is then merged over those that
            have it. Companions have no such parts and stay whole.
        normalize: first scale every adapter, by one factor for all its layers, to the geometric mean of the norms
            `||dW_i||_F`, so that the weights alone say how strong each is. The mean does not depend on the order of
            the adapters and keeps the product of their norms.
        **options: options of the method.

    Returns:
        The merged adapter; its header's `method` says how it was made and `merged_from` from what: each part's
        `weight`, its own `norm` and, when normalised, the `scale` it was given besides.

    Raises:
        QrloraError: different layers (without `blocks`), blocks that hold nothing, different base models, values that
            are not finite, an explicit sum of different bases, an unknown method or option; naming the layer; with
            `normalize`, an update of zero.
    """
    if not adapters:
        raise QrloraError("there is nothing to merge; give at least one adapter.")
    used = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(used) != len(adapters):
        raise QrloraError(f"{len(adapters)} adapters but {len(used)} weights; give one weight an adapter.")
    for weight in used:
        check_weight(weight)
    if blocks is not None:
        if len(blocks) != len(adapters):
            raise QrloraError(f'{len(adapters)} adapters but {len(blocks)} blocks; give one an adapter ("all": whole).')
        adapters = [restricted(adapter, part) for adapter, part in zip(adapters, blocks, strict=True)]
    check_compatible(adapters, equal_layers=blocks is None)
    survey = surveyed(adapters)
    norms = survey.norms
    notes: list[dict[str, Any]] = [{"norm": norm} for norm in norms]
    parts = list(adapters)
    if normalize:
        scales = equal_norm_scales(adapters, norms)
        parts = [adapter.scaled(scale) for adapter, scale in zip(adapters, scales, strict=True)]
        notes = [note | {"scale": scale} for note, scale in zip(notes, scales, strict=True)]
    else:
        warn_of_unequal_norms(adapters, used, norms)

    def merge_group(some: Sequence[Adapter], theirs: Sequence[float]) -> Adapter:
        return run(_choose(some, survey) if method == "auto" else method, some, theirs, options)

    def merge_companions(some: Sequence[Adapter], theirs: Sequence[float]) -> Adapter:
        chosen = for_text_encoders(method)
        return run(_choose(some, survey), some, theirs, {}) if chosen == "auto" else run(chosen, some, theirs, options)

    merged = merge_by_layers([part.alone() for part in parts], used, merge_group)
    companions: dict[Component, Adapter] = {}
    for component in TEXT_ENCODERS:
        theirs = companions_of(parts, component)
        if theirs:
            owned = [used[index] for index in theirs]
            whole = merge_by_layers(list(theirs.values()), owned, merge_companions)
            companions[component] = replace(whole, source=None)
    merged = replace(merged, companions=companions)
    if blocks is not None:
        notes = [note | {"blocks": part} for note, part in zip(notes, blocks, strict=True)]
    return _with_notes(merged, notes)


def _with_notes(merged: Adapter, notes: Sequence[dict[str, Any]]) -> Adapter:
    """What is known of the parts here, added to the methods' own account of them."""
    if merged.header is None or merged.header.merged_from is None:
        return merged
    story = [part | note for part, note in zip(merged.header.merged_from, notes, strict=True)]
    return replace(merged, header=merged.header.model_copy(update={"merged_from": story}))


def _choose(adapters: Sequence[Adapter], survey: Survey) -> str:
    difference = basis_difference(adapters, BASIS_TOLERANCE, survey.bases[adapters[0].component])
    if difference is None:
        return "sum"
    if len(adapters) > 1:
        ranks = [adapter.rank for adapter in adapters]
        warnings.warn(
            f"{difference}, so the adapters are concatenated: exact, at rank {' + '.join(map(str, ranks))} = "
            f"{sum(ranks)}.",
            QrloraWarning,
            stacklevel=5,
        )
    return "concat"
