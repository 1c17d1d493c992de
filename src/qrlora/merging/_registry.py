"""Merge methods by name. A method is one typed function in a file of `methods/`; its keyword arguments are its
options."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from qrlora.errors import QrloraError
from qrlora.formats import Adapter

MergeMethod = Callable[..., Adapter]
_METHODS: dict[str, MergeMethod] = {}


def register_merge(name: str) -> Callable[[MergeMethod], MergeMethod]:
    """Register `function(adapters, weights, **options) -> Adapter` as a merge method.

    Args:
        name: what `merge(method=...)` and the command line call it.
    """

    def register(function: MergeMethod) -> MergeMethod:
        _METHODS[name] = function
        return function

    return register


def merge_names() -> tuple[str, ...]:
    """The names `merge` takes, `auto` first."""
    return ("auto", *sorted(_METHODS))


def run(name: str, adapters: Sequence[Adapter], weights: Sequence[float], options: dict[str, Any]) -> Adapter:
    """Call a registered method, after its name and its options were checked."""
    if name not in _METHODS:
        raise QrloraError(f"merge method {name!r} is not known; the known ones are {', '.join(merge_names())}.")
    function = _METHODS[name]
    known = list(inspect.signature(function).parameters)[2:]
    for option in options:
        if option not in known:
            described = f"its options are {', '.join(known)}" if known else "it has no options"
            raise QrloraError(f"merge method {name!r} has no option {option!r}; {described}.")
    return function(adapters, weights, **_validated(name, function, options))


def _validated(name: str, function: MergeMethod, options: dict[str, Any]) -> dict[str, Any]:
    """The options as the method's annotations have them; a number given as text is none."""
    hints = get_type_hints(function)
    checked: dict[str, Any] = {}
    for option, value in options.items():
        try:
            checked[option] = TypeAdapter(hints[option]).validate_python(value, strict=isinstance(value, str | bool))
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise QrloraError(f"merge method {name!r}: {option}={value!r} is not valid: {problem}.") from error
    return checked
