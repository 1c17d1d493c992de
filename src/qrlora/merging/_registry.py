"""Merge methods by name. A method is one typed function in a file of `methods/`; its keyword arguments are its
options."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from qrlora.errors import QrloraError
from qrlora.formats import Adapter

MergeMethod = Callable[..., Adapter]
RuleMaker = Callable[..., Any]
_METHODS: dict[str, MergeMethod] = {}
_DENOISER_ONLY: set[str] = set()
_RUN_TIME: dict[str, tuple[RuleMaker, str]] = {}


def register_merge(name: str, *, denoiser_only: bool = False) -> Callable[[MergeMethod], MergeMethod]:
    """Register `function(adapters, weights, **options) -> Adapter` as a merge method.

    Args:
        name: what `merge(method=...)` and the command line call it.
        denoiser_only: it means nothing for text encoders, whose adapters are then merged by "auto".
    """

    def register(function: MergeMethod) -> MergeMethod:
        _METHODS[name] = function
        if denoiser_only:
            _DENOISER_ONLY.add(name)
        return function

    return register


def merge_names() -> tuple[str, ...]:
    """The names `merge` takes, `auto` first."""
    return ("auto", *sorted(_METHODS))


def register_run_time(name: str, reason: str) -> Callable[[RuleMaker], RuleMaker]:
    """Register `function(adapters, **options) -> RunTimeRule` as a way to use adapters together that no file can hold.

    Args:
        name: what the command line calls it.
        reason: the sentence with which `merge` refuses it.
    """

    def register(function: RuleMaker) -> RuleMaker:
        _RUN_TIME[name] = function, reason
        return function

    return register


def run_time_names() -> tuple[str, ...]:
    """The methods that act while a picture is drawn, and that `merge` refuses."""
    return tuple(sorted(_RUN_TIME))


def run_time_maker(name: str) -> RuleMaker | None:
    """The function of a run-time method."""
    return _RUN_TIME[name][0] if name in _RUN_TIME else None


def merge_options(name: str) -> tuple[str, ...]:
    """The options of a method that `merge` knows; none of others, and of "auto"."""
    return tuple(inspect.signature(_METHODS[name]).parameters)[2:] if name in _METHODS else ()


def for_text_encoders(name: str) -> str:
    """The method by which adapters of text encoders are merged where those of the denoiser are by `name`."""
    # A sum of the denoiser's parts says nothing of the bases of others.
    return "auto" if name == "sum" or name in _DENOISER_ONLY else name


def run(name: str, adapters: Sequence[Adapter], weights: Sequence[float], options: Mapping[str, Any]) -> Adapter:
    """Call a registered method, after its name and its options were checked."""
    if name in _RUN_TIME:
        raise QrloraError(_RUN_TIME[name][1])
    if name not in _METHODS:
        raise QrloraError(f"merge method {name!r} is not known; the known ones are {', '.join(merge_names())}.")
    function = _METHODS[name]
    return function(adapters, weights, **validated(name, function, options, skip=2))


def validated(name: str, function: Callable[..., Any], options: Mapping[str, Any], *, skip: int) -> dict[str, Any]:
    """Options as a method's annotations have them; a number given as text is none.

    Args:
        name: of the method, for sentences.
        function: the method, whose parameters after the first `skip` are its options.
        options: by name.
        skip: how many parameters are no options.

    Raises:
        QrloraError: an option that it does not have, or a value that is not valid.
    """
    known = list(inspect.signature(function).parameters)[skip:]
    hints = get_type_hints(function, include_extras=True)
    checked: dict[str, Any] = {}
    for option, value in options.items():
        if option not in known:
            described = f"its options are {', '.join(known)}" if known else "it has no options"
            raise QrloraError(f"merge method {name!r} has no option {option!r}; {described}.")
        try:
            checked[option] = TypeAdapter(hints[option]).validate_python(value, strict=isinstance(value, str | bool))
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise QrloraError(f"merge method {name!r}: {option}={value!r} is not valid: {problem}.") from error
    return checked
