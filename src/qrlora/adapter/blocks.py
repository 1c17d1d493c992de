"""Parts of a network by name, for adapters that are trained on, or merged from, some of its blocks alone."""

import difflib
import re
from collections.abc import Iterable
from importlib import import_module

from qrlora.errors import QrloraError

Blocks = str | list[str]
"""A preset's name, a range such as "single_transformer_blocks.10-37", or a regular expression for the beginning of
module paths; of several, the layers of all."""
_PRESETS: dict[str, tuple[str, ...]] = {}
_RANGE = re.compile(r"([A-Za-z_][\w.]*)\.(\d+)-(\d+)")
_WORD = re.compile(r"[a-z][a-z0-9-]*")


def register_blocks(name: str, *parts: str) -> None:
    """Give some blocks a name.

    Args:
        name: small letters, digits and "-".
        parts: ranges or regular expressions; see `Blocks`.
    """
    _PRESETS[name] = parts


def block_names() -> tuple[str, ...]:
    """The presets, sorted."""
    import_module("qrlora.models")  # the families stand above this package and register theirs when imported
    return tuple(sorted(_PRESETS))


def layers_in(blocks: Blocks, layers: Iterable[str]) -> list[str]:
    """Those of some layers that lie in the blocks, in their order.

    Args:
        blocks: see `Blocks`.
        layers: module paths inside the denoiser.

    Raises:
        QrloraError: an expression that is not valid, or a part in which none of the layers lies.
    """
    names = list(layers)
    kept: set[str] = set()
    for part in [blocks] if isinstance(blocks, str) else blocks:
        found = [name for name in names if any(_lies_in(name, piece) for piece in _pieces(part))]
        if not found:
            raise QrloraError(f"blocks={part!r} holds none of the {len(names)} layers{_hint(part, names)}")
        kept.update(found)
    return [name for name in names if name in kept]


def check_blocks(blocks: Blocks) -> None:
    """Refuse what is no blocks for any model.

    Raises:
        QrloraError: an expression or a range that is not valid.
    """
    for part in [blocks] if isinstance(blocks, str) else blocks:
        for piece in _pieces(part):
            _lies_in("", piece)


def _pieces(part: str) -> tuple[str, ...]:
    if part not in _PRESETS and _WORD.fullmatch(part):
        block_names()
    return _PRESETS.get(part, (part,))


def _lies_in(name: str, piece: str) -> bool:
    found = _RANGE.fullmatch(piece)
    if found is not None:
        first, last = int(found[2]), int(found[3])
        if first > last:
            raise QrloraError(f"blocks={piece!r} is an empty range; write the smaller number first.")
        index = re.match(rf"{re.escape(found[1])}\.(\d+)(?:\.|$)", name)
        return index is not None and first <= int(index[1]) <= last
    try:
        return re.match(rf"(?:{piece})(?:\.|$)", name) is not None
    except re.error as error:
        raise QrloraError(
            f"blocks={piece!r} is no preset ({', '.join(block_names())}), and no valid regular expression: {error}."
        ) from error


def _hint(part: str, names: list[str]) -> str:
    close = difflib.get_close_matches(part, block_names(), n=1)
    if close and close[0] != part:
        return f"; did you mean {close[0]!r}?"
    seen = dict.fromkeys(re.sub(r"\.\d+\..*", "", name) for name in names)
    return f", which lie in {', '.join(list(seen)[:6])}."
