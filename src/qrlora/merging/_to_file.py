"""Adapters into one file, each read once where that is possible."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qrlora.adapter import Blocks, by_layer
from qrlora.errors import QrloraWarning
from qrlora.formats import Adapter, Header, SaveDtype, write_native
from qrlora.merging._checks import BasesDifferError, basis_differences, common_side
from qrlora.merging._merge import Asked, choose, surveyed_merge
from qrlora.merging._norms import norm_warnings
from qrlora.merging._survey import Watched

_IN_PASSING = ("auto", "sum", "concat")
_TO_THE_CALLER = 9
"""Frames from where a header is asked for to who called `merge_to_file`."""


def merge_to_file(
    adapters: Sequence[Adapter],
    path: str | Path,
    weights: Sequence[float] | None = None,
    method: str = "auto",
    *,
    blocks: Sequence[Blocks] | None = None,
    normalize: bool = False,
    save_dtype: SaveDtype = "fp32",
    **options: Any,
) -> Adapter:
    """`merge(...)`, saved to a native file: the same file, bit for bit.

    `sum`, `concat` and `auto` read each layer once: it is checked and weighed while it is merged and written, and the
    norms of the parts, which stand in the header, are written last. Two readings, as of `merge`, are what `normalize`
    and other methods take, and `auto` where the bases are one in the first layer and differ in a later one.

    Args:
        adapters: as of `merge`, like all that is not named here.
        path: the file, ending in .safetensors; whatever goes wrong, an older one stays as it was.
        save_dtype: "fp32" or "bf16".

    Returns:
        The merge; its layers are on demand where they were read once, so an input that was overwritten meanwhile is
        refused when one is asked for.

    Raises:
        QrloraError: as `merge`; the file cannot be written.
    """
    asked = Asked.checked(adapters, weights, method, blocks, options)
    if not normalize and method in _IN_PASSING:
        merged = _in_passing(asked, path, save_dtype)
        if merged is not None:
            return merged
    merged, told = surveyed_merge(asked, normalize=normalize)
    for each in told:
        warnings.warn(each, stacklevel=2)
    merged.save(path, save_dtype=save_dtype)
    return merged


def _in_passing(asked: Asked, path: str | Path, save_dtype: SaveDtype) -> Adapter | None:
    """Merged and written in one reading; None, and nothing written or told, where the first layer misled."""
    watched, guessed, told = Watched(asked.adapters), list[str](), list[QrloraWarning]()

    def automatic(some: Sequence[Adapter]) -> str:
        guessed.append(choose(some, _as_the_first_layer(some), told))
        return guessed[-1]

    merged = asked.merged(watched.adapters, automatic)

    def header() -> Header | None:
        # Before the file has its name: warnings may be errors.
        for each in (*norm_warnings(asked.adapters, asked.weights, watched.norms), *told):
            warnings.warn(each, stacklevel=_TO_THE_CALLER)
        return asked.with_norms(merged, watched.norms).header

    unknown = [0.0] * len(asked.adapters)
    try:
        write_native(asked.with_norms(merged, unknown), path, save_dtype=save_dtype, header=header)
    except BasesDifferError as error:
        asked_for = asked.method == "sum" and error.component == asked.adapters[0].component
        if asked_for or "sum" not in guessed:
            raise
        return None
    return asked.with_norms(merged, watched.norms)


def _as_the_first_layer(adapters: Sequence[Adapter]) -> dict[str, list[float]]:
    """The differences of the bases by layer, those of the first one's as it is and none in the others."""
    side, _ = common_side(adapters)
    if side is None:
        return {}
    found = {layer: [0.0] * (len(adapters) - 1) for layer in adapters[0].layers}
    # On one thread, as everything is looked at, so that norms have the same bits on any machine.
    first = next(iter(found))
    looked_at = by_layer(lambda layer: basis_differences([each.layers[layer] for each in adapters], side), [first])
    return found | {first: next(looked_at)}
