"""Which layers of a denoiser are adapted."""

import difflib
import re
from collections.abc import Callable, Collection, Iterator
from importlib import import_module

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qrlora.adapter._weights import is_adaptable, path_stem
from qrlora.adapter.blocks import Blocks, layers_in
from qrlora.errors import QrloraError

_TARGETS: dict[str, tuple[str, ...]] = {}
_IDLE: dict[str, Callable[[nn.Module], Collection[str]]] = {}


def register_targets(
    class_name: str, patterns: tuple[str, ...], idle: Callable[[nn.Module], Collection[str]] = lambda denoiser: ()
) -> None:
    """Say what `target_modules="auto"` means for a class of denoisers.

    Args:
        class_name: of the denoiser, such as "FluxTransformer2DModel"; its subclasses follow.
        patterns: names that match the last whole components of a module's path.
        idle: paths that these names match and a denoiser has no use for, which are left out.
    """
    _TARGETS[class_name], _IDLE[class_name] = patterns, idle


def adaptable_layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv2d by its path, peft's wrapper in place of the layer where there is one."""
    stem = path_stem(denoiser)
    return {stem + name: module for name, module in _own_modules(denoiser) if name and is_adaptable(module)}


def target_layers(
    denoiser: nn.Module, target_modules: str | list[str] = "auto", blocks: Blocks | None = None
) -> list[str]:
    """The paths of the layers that `target_modules` means within `blocks`, in the order of the model.

    Args:
        denoiser: any model; layers inside peft's wrappers are seen as themselves.
        target_modules: "auto", a regular expression for whole paths, or names that match the last whole components of a
            path (so "attn.to_q" does not match "attn2.to_q" nor "xattn.to_q").
        blocks: the part of the network; all of it where None.

    Raises:
        QrloraError: "auto" for an unknown class of models, an invalid expression, or nothing matches.
    """
    found = _matching(denoiser, target_modules)
    return found if blocks is None else layers_in(blocks, found)


def _matching(denoiser: nn.Module, target_modules: str | list[str]) -> list[str]:
    names = list(adaptable_layers(denoiser))
    if isinstance(target_modules, list):
        for wanted in target_modules:
            if not any(_ends_with(name, wanted) for name in names):
                raise QrloraError(
                    f"target_modules: {wanted!r} matches no Linear or Conv2d layer of "
                    f"{_kind(denoiser)}{_near(wanted, names)}."
                )
        found = [name for name in names if any(_ends_with(name, wanted) for wanted in target_modules)]
    elif target_modules == "auto":
        patterns, idle = _patterns_of(denoiser)
        found = [name for name in names if name not in idle and any(_ends_with(name, end) for end in patterns)]
    else:
        found = [name for name in names if _expression(target_modules).fullmatch(name)]
    if not found:
        raise QrloraError(f"target_modules={target_modules!r} matches no Linear or Conv2d layer of {_kind(denoiser)}.")
    return found


def _own_modules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` that does not descend into peft's wrappers."""
    yield prefix, root
    if isinstance(root, BaseTunerLayer):
        return
    for name, child in root.named_children():
        yield from _own_modules(child, f"{prefix}.{name}" if prefix else name)


def _ends_with(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _kind(denoiser: nn.Module) -> str:
    return type(denoiser).__name__


def _near(wanted: str, names: list[str]) -> str:
    count = wanted.count(".") + 1
    ends = {".".join(name.split(".")[-count:]) for name in names}
    close = difflib.get_close_matches(wanted, sorted(ends), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise QrloraError(f"target_modules={text!r} is not a valid regular expression: {error}.") from error


def _patterns_of(denoiser: nn.Module) -> tuple[tuple[str, ...], Collection[str]]:
    # The families stand above this package and register themselves when they are imported.
    import_module("qrlora.models")
    for parent in type(denoiser).__mro__:
        if parent.__name__ in _TARGETS:
            return _TARGETS[parent.__name__], _IDLE[parent.__name__](denoiser)
    known = ", ".join(sorted(_TARGETS)) or "none"
    raise QrloraError(
        f'target_modules="auto" is not known for {_kind(denoiser)} (known: {known}); '
        "give a list of names or a regular expression."
    )
