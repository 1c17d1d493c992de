"""Adapters into one adapter."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qrlora.adapter import Blocks
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import TEXT_ENCODERS, Adapter, Component, check_weight
from qrlora.merging._checks import basis_difference, check_compatible, companions_of
from qrlora.merging._norms import equal_norm_scales, norm_warnings
from qrlora.merging._parts import merge_by_layers, restricted
from qrlora.merging._registry import for_text_encoders, run
from qrlora.merging._survey import surveyed

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
    of loaded adapters; `merge_to_file` reads them once for both. The other methods read a layer at a time too, but hold
    their result; knots holds all updates in its common frames, and orthogonal reads three times.

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
    asked = Asked.checked(adapters, weights, method, blocks, options)
    merged, told = surveyed_merge(asked, normalize=normalize)
    for each in told:
        warnings.warn(each, stacklevel=2)
    return merged


def surveyed_merge(asked: "Asked", *, normalize: bool) -> tuple[Adapter, list[QrloraWarning]]:
    """The merge after a look at all values, and what is to be told of it."""
    survey = surveyed(asked.adapters)
    scales: list[float] | None = None
    told: list[QrloraWarning] = []
    if normalize:
        scales = equal_norm_scales(asked.adapters, survey.norms)
        scaled = [adapter.scaled(scale) for adapter, scale in zip(asked.adapters, scales, strict=True)]
    else:
        scaled = asked.adapters
        told += norm_warnings(asked.adapters, asked.weights, survey.norms)
    merged = asked.merged(scaled, lambda some: choose(some, survey.bases[some[0].component], told))
    return asked.with_norms(merged, survey.norms, scales), told


@dataclass(frozen=True)
class Asked:
    """What `merge` was asked for, after everything but the values was checked."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    method: str
    blocks: Sequence[Blocks] | None
    options: Mapping[str, Any]

    @classmethod
    def checked(
        cls,
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None,
        method: str,
        blocks: Sequence[Blocks] | None,
        options: Mapping[str, Any],
    ) -> "Asked":
        """The arguments of `merge`, the adapters restricted to their blocks."""
        if not adapters:
            raise QrloraError("there is nothing to merge; give at least one adapter.")
        used = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
        if len(used) != len(adapters):
            raise QrloraError(f"{len(adapters)} adapters but {len(used)} weights; give one weight an adapter.")
        for weight in used:
            check_weight(weight)
        if blocks is not None:
            if len(blocks) != len(adapters):
                raise QrloraError(
                    f'{len(adapters)} adapters but {len(blocks)} blocks; give one an adapter ("all": whole).'
                )
            adapters = [restricted(adapter, part) for adapter, part in zip(adapters, blocks, strict=True)]
        check_compatible(adapters, equal_layers=blocks is None)
        return cls(adapters, used, method, blocks, options)

    def merged(self, adapters: Sequence[Adapter], automatic: Callable[[Sequence[Adapter]], str]) -> Adapter:
        """The merge, without the norms of its parts.

        Args:
            adapters: those that were asked for, as they are to be merged.
            automatic: "sum" or "concat", for adapters of equal layers where "auto" is to choose.
        """

        def merge_group(some: Sequence[Adapter], theirs: Sequence[float]) -> Adapter:
            return run(automatic(some) if self.method == "auto" else self.method, some, theirs, self.options)

        def merge_companions(some: Sequence[Adapter], theirs: Sequence[float]) -> Adapter:
            chosen = for_text_encoders(self.method)
            if chosen == "auto":
                return run(automatic(some), some, theirs, {})
            return run(chosen, some, theirs, self.options)

        merged = merge_by_layers([part.alone() for part in adapters], self.weights, merge_group)
        companions: dict[Component, Adapter] = {}
        for component in TEXT_ENCODERS:
            theirs = companions_of(adapters, component)
            if theirs:
                owned = [self.weights[index] for index in theirs]
                whole = merge_by_layers(list(theirs.values()), owned, merge_companions)
                companions[component] = replace(whole, source=None)
        return replace(merged, companions=companions)

    def with_norms(self, merged: Adapter, norms: Sequence[float], scales: Sequence[float] | None = None) -> Adapter:
        """The merge with what is known of the parts here, added to the methods' own account of them."""
        if merged.header is None or merged.header.merged_from is None:
            return merged
        story: list[dict[str, Any]] = []
        for index, part in enumerate(merged.header.merged_from):
            note: dict[str, Any] = {"norm": norms[index]}
            if scales is not None:
                note["scale"] = scales[index]
            if self.blocks is not None:
                note["blocks"] = self.blocks[index]
            story.append(part | note)
        return replace(merged, header=merged.header.model_copy(update={"merged_from": story}))


def choose(adapters: Sequence[Adapter], differences: Mapping[str, Sequence[float]], told: list[QrloraWarning]) -> str:
    """What "auto" is for adapters of equal layers: "sum", or "concat".

    Args:
        adapters: of one component.
        differences: of their bases by layer; see `basis_differences`.
        told: gets a warning that says why they are concatenated.
    """
    difference = basis_difference(adapters, BASIS_TOLERANCE, differences)
    if difference is None:
        return "sum"
    if len(adapters) > 1:
        ranks = [adapter.rank for adapter in adapters]
        words = f"so the adapters are concatenated: exact, at rank {' + '.join(map(str, ranks))} = {sum(ranks)}."
        told.append(QrloraWarning(f"{difference}, {words}"))
    return "concat"
