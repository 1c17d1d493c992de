"""Options of a verb from a pydantic class, and errors as one sentence."""

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import tyro
import yaml
from pydantic import BaseModel, ValidationError
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from qrlora.errors import QrloraError

Options = TypeVar("Options", bound=BaseModel)
_UNKNOWN = re.compile(r"Unrecognized options: (-[^\s,=]*)")
_MISSING = re.compile(r"Missing from [^:]*: (\S+)")
_METAVARS = {Path: "PATH", str: "TEXT", int: "INT", float: "FLOAT"}
_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _left_to_pydantic(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Texts, numbers and paths, also where they may be left out, go to pydantic as they were typed.

    So one place knows what is valid, and the help says PATH where it would say {None}|PATH.
    """
    wanted: Any = info.type
    if get_origin(wanted) in (Union, UnionType):
        kinds = [kind for kind in get_args(wanted) if kind is not type(None)]
        wanted = kinds[0] if len(kinds) == 1 else None
    if wanted not in _METAVARS:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=_METAVARS[wanted],
        instance_from_str=lambda texts: texts[0],
        is_instance=lambda value: value is None or isinstance(value, (wanted, int)),
        str_from_instance=lambda value: [str(value)],
    )


def parse_options(cls: type[Options], verb: str, arguments: Sequence[str]) -> Options:
    """Read a verb's options by the fields of `cls`; `--help` prints them and exits.

    Raises:
        QrloraError: an unknown option (with the nearest valid one), a missing or an invalid value.
    """
    said = io.StringIO()
    asks_help = any(argument in ("-h", "--help") for argument in arguments)
    try:
        with contextlib.nullcontext() if asks_help else contextlib.redirect_stderr(said):
            return tyro.cli(
                cls,
                prog=f"qrlora {verb}",
                args=list(arguments),
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
                registry=_REGISTRY,
            )
    except SystemExit as stop:
        if asks_help or stop.code in (0, None):
            raise
        if isinstance(stop.__context__, ValidationError):
            raise QrloraError(_sentence(stop.__context__)) from stop.__context__
        raise QrloraError(_plain(said.getvalue(), cls, f"qrlora {verb} --help shows the options.")) from None


def flag(name: str) -> str:
    """The option of a field: `max_train_steps` is `--max-train-steps`."""
    return "--" + name.strip("_").replace("_", "-")


def method_options(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` texts as keyword arguments; the values are numbers, true, false, or words.

    Raises:
        QrloraError: a text without =, or a value that is a list or a mapping.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise QrloraError(f"--option {text}: write NAME=VALUE, such as density=0.3.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise QrloraError(f"--option {text}: {value!r} is no number and no word.") from error
        if not isinstance(parsed, str | int | float | bool):
            raise QrloraError(f"--option {text}: {value!r} is no number and no word.")
        found[name] = parsed
    return found


def refuse_existing(path: Path, overwrite: bool) -> None:
    """An output that is there already is left alone."""
    if path.exists() and not overwrite:
        raise QrloraError(f"--output {path} exists; name another file or add --overwrite.")


def say(*parts: Any) -> None:
    """A line for the user, on standard error, so that standard output stays what was asked for."""
    print(*parts, file=sys.stderr, flush=True)


def _sentence(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = flag(str(problem["loc"][0])) if problem["loc"] else "the options"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key} {problem['input']} is not valid: it {message}."


def _plain(text: str, cls: type[BaseModel], way_out: str) -> str:
    """What tyro drew in a box, as one sentence; an unknown option with the nearest valid one."""
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()][1:]  # the first is the title of the box
    body = lines[: lines.index("")] if "" in lines else lines
    words = " ".join(body)
    if match := _UNKNOWN.search(words):
        close = difflib.get_close_matches(match[1], [flag(name) for name in cls.model_fields], n=1, cutoff=0.5)
        return f"unknown option {match[1]}; {f'did you mean {close[0]}?' if close else way_out}"
    if match := _MISSING.search(words):
        return f"{match[1]} is missing; {way_out}"
    return f"{words.rstrip('.')}; {way_out}"
