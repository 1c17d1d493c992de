"""Adapters into one file, each read once where that is possible."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qrlora.adapter import Blocks, by_layer
from qrlora.formats import Adapter, Header, SaveDtype, write_native
from qrlora.merging._checks import BasesDifferError, basis_differences, common_side
from qrlora.merging._merge import Asked, choose, merge
from qrlora.merging._norms import warn_of_unequal_norms
from qrlora.merging._survey import Watched

_IN_PASSING = ("auto", "sum", "concat")


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
        The merge, as `merge` gives it.

    Raises:
        QrloraError: as `merge`; the file cannot be written.
    """

    def in_two_readings() -> Adapter:
        merged = merge(adapters, weights, method, blocks=blocks, normalize=normalize, **options)
        merged.save(path, save_dtype=save_dtype)
        return merged

    if normalize or method not in _IN_PASSING:
        return in_two_readings()
    asked = Asked.checked(adapters, weights, method, blocks, options)
    watched, guessed = Watched(asked.adapters), list[str]()

    def automatic(some: Sequence[Adapter]) -> str:
        guessed.append(choose(some, _as_the_first_layer(some)))
        return guessed[-1]

    merged = asked.merged(watched.adapters, automatic)

    def header() -> Header | None:
        warn_of_unequal_norms(asked.adapters, asked.weights, watched.norms)
        return asked.with_norms(merged, watched.norms).header

    unknown = [0.0] * len(adapters)
    try:
        write_native(asked.with_norms(merged, unknown), path, save_dtype=save_dtype, header=header)
    except BasesDifferError:
        if "sum" not in guessed:
            raise
        return in_two_readings()
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
