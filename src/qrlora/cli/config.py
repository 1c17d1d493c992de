"""`qrlora config init|check`: training configurations."""

import ast
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import dedent, wrap
from typing import Annotated, Any

import tyro
import yaml
from docstring_parser import parse as parse_docstring
from pydantic import BaseModel, ConfigDict

from qrlora.cli._options import parse_options, refuse_existing, say
from qrlora.errors import QrloraError


class InitOptions(BaseModel):
    """Write a commented training configuration with every key at its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Annotated[Path, tyro.conf.Positional] = Path("config.yaml")
    """The file."""
    overwrite: bool = False
    """Replace it."""


class CheckOptions(BaseModel):
    """Check training configurations; a typo is told with the nearest valid key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """YAML files."""
    resolve: bool = False
    """Also print each with every key and value."""


def run(arguments: Sequence[str]) -> None:
    """`init` or `check`."""
    actions = {"init": _init, "check": _check}
    if arguments and arguments[0] in actions:
        return actions[arguments[0]](arguments[1:])
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: qrlora config init [FILE] | qrlora config check FILE...")
        return None
    raise QrloraError("say what to do: qrlora config init [FILE], or qrlora config check FILE...")


def _init(arguments: Sequence[str]) -> None:
    options = parse_options(InitOptions, "config init", arguments)
    refuse_existing(options.output, options.overwrite)
    from qrlora.formats import atomic_write

    atomic_write(options.output, commented_config(f"qrlora train {options.output}"))
    print(options.output)


def _check(arguments: Sequence[str]) -> None:
    options = parse_options(CheckOptions, "config check", arguments)
    from qrlora.training import TrainConfig

    problems: list[str] = []
    for file in options.files:
        try:
            config = TrainConfig.from_yaml(file)
        except QrloraError as error:
            problems.append(str(error))
            continue
        say(f"{file}: valid")
        if options.resolve:
            print(config.to_yaml(), end="")
    if problems:
        raise QrloraError("\n".join(problems))


def commented_config(command: str) -> str:
    """YAML of every training key at its default, each under a comment that says what it is."""
    from qrlora.training import TrainConfig

    lines = [f"# {command}", ""]
    for path, comment, default, _ in _fields(TrainConfig):
        *sections, name = path
        indent = "  " * len(sections)
        lines += [f"{indent}# {line}" for line in wrap(comment, 116 - len(indent))]
        if default is _SECTION:
            lines.append(f"{indent}{name}:")
        elif name in _EXAMPLES:
            lines.append(f"{indent}{name}: {_EXAMPLES[name]}")
        else:
            shown = yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"{indent}{name}: {shown}")
    return "\n".join(lines) + "\n"


def described_keys() -> Iterator[str]:
    """Every training key with its default and what it is, for `qrlora train --help`."""
    from qrlora.training import TrainConfig

    for path, comment, default, required in _fields(TrainConfig):
        if default is not _SECTION:
            yield f"  --{'.'.join(path)}  ({'needed' if required else default})"
            yield from (f"        {line}" for line in wrap(comment, 104))


_SECTION = object()
_EXAMPLES = {"instance_data_dir": "pictures/dog.png", "output_dir": "out/dog"}


def _fields(cls: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any, bool]]:
    """Path, comment, default and whether it is required, of every field, sections before what is in them."""
    comments = _comments(cls)
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield (*above, name), comments.get(name, ""), _SECTION, False
            yield from _fields(type(default), (*above, name))
        else:
            yield (*above, name), comments.get(name, ""), default, field.is_required()


def _comments(cls: type[BaseModel]) -> dict[str, str]:
    """What each field is: the string under it, or its entry in the docstring of the class, or of a parent."""
    parent = cls.__base__
    found = _comments(parent) if parent is not None and parent is not BaseModel else {}
    found |= {entry.arg_name: entry.description or "" for entry in parse_docstring(cls.__doc__ or "").params}
    body = ast.parse(dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, after in zip(body.body, body.body[1:], strict=False):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
            case _:
                pass
    return {name: " ".join(text.split()) for name, text in found.items()}
