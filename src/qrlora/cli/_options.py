"""Options of a verb from a pydantic class, and errors as one sentence."""

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError

from qrlora.errors import QrloraError

Options = TypeVar("Options", bound=BaseModel)
_UNKNOWN = re.compile(r"[Uu]nrecognized (?:options|arguments?|option)[^:]*:\s*(\S+)")


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
            )
    except ValidationError as error:
        raise QrloraError(_sentence(error)) from error
    except SystemExit as stop:
        if asks_help or stop.code in (0, None):
            raise
        raise QrloraError(f"{_plain(said.getvalue(), cls)} (qrlora {verb} --help shows the options)") from None


def flag(name: str) -> str:
    """The option of a field: `max_train_steps` is `--max-train-steps`."""
    return "--" + name.strip("_").replace("_", "-")


def _sentence(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = flag(str(problem["loc"][0])) if problem["loc"] else "the options"
    return f"{key} {problem['input']!r} is not valid: {problem['msg'].removeprefix('Value error, ')}."


def _plain(text: str, cls: type[BaseModel]) -> str:
    """What tyro drew in a box, as one sentence; an unknown option with the nearest valid one."""
    lines = [line.strip(" │╭╮╰╯─") for line in text.splitlines()]
    words = " ".join(line for line in lines if line and not line.startswith("For full helptext"))
    match = _UNKNOWN.search(words)
    if match is None:
        return words.removeprefix("Parsing error ").strip() or "the options cannot be read"
    wrong = match[1].split("=")[0]
    known = [flag(name) for name in cls.model_fields]
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.0)
    return f"unknown option {wrong}; did you mean {close[0]}?"


def refuse_existing(path: Path, overwrite: bool) -> None:
    """An output that is there already is left alone."""
    if path.exists() and not overwrite:
        raise QrloraError(f"--output {path} exists; name another file or add --overwrite.")


def say(*parts: Any) -> None:
    """A line for the user, on standard error, so that standard output stays what was asked for."""
    print(*parts, file=sys.stderr, flush=True)
