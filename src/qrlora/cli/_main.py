"""From `sys.argv` to a verb, and from what went wrong to an exit code.

0: done. 1: some of several jobs failed. 2: bad input, told in one sentence. 130, 143: stopped by Ctrl-C or SIGTERM.
Anything else is a bug and shows a traceback.
"""

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import TextIO

from qrlora import __version__
from qrlora.errors import QrloraError, QrloraWarning, tell

VERBS = {
    "blend": "two pictures in; two adapters, their merge and a sheet of pictures out",
    "train": "train one adapter",
    "train-many": "train a list of adapters on one loaded model",
    "merge": "adapters into one adapter",
    "analyze": "how adapters relate, layer by layer, as a report to read",
    "evaluate": "scores of pictures, or of what adapters draw, as a report to look at",
    "generate": "pictures with adapters at weights; or the same picture again",
    "export": "an adapter file of any tool, written for another one",
    "inspect": "what an adapter file or a picture says of itself",
    "basis": "compute the bases of a model once, for all later trainings",
    "estimate": "how much memory a training will take, without loading anything",
    "config": "write or check training configurations",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see the module for exit codes.

    Args:
        arguments: without the program's name; `sys.argv[1:]` where None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if given else 2
    if given[0] in ("-V", "--version", "version"):
        print(f"qrlora {__version__}")
        return 0
    _quiet_libraries()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _run_verb(given[0], given[1:])
    except QrloraError as error:
        tell(f"qrlora: {error}")
        return 2
    except KeyboardInterrupt:
        tell("qrlora: stopped.")
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone (`qrlora inspect FILE | head`); nothing is left to say, nor to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # Raised by a training that could still save; importing its class here would cost every start two seconds.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        tell(f"qrlora: {error}")
        return int(code)
    return 0


# What the libraries say at every import, at any verbosity, of parts that text-to-image never calls, or of optional
# packages that a model in use would miss with an error of its own.
_NOISE = {
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "torch.utils._pytree": "register_constant() on Enum subclasses is deprecated",
    "torchao": "Failed to load",
    "torchao.kernel.intmm": "Detected no triton",
}


def _run_verb(verb: str, arguments: list[str]) -> None:
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(VERBS)}."
        raise QrloraError(f"unknown verb {verb!r}; {hint}")
    import_module(f"qrlora.cli.{verb.replace('-', '_')}").run(arguments)


def _quiet_libraries() -> None:
    """The libraries' own switches, read when they are imported; a user's setting wins.

    Their advice concerns programmers (slow tokenizers, optional packages), and pictures have our own progress.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name, words in _NOISE.items():
        logging.getLogger(name).addFilter(partial(_lacks, words))


def _lacks(words: str, record: logging.LogRecord) -> bool:
    return words not in record.getMessage()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours as one line to the user; others as Python shows them."""
    if issubclass(category, QrloraWarning):
        tell(f"qrlora: note: {message}")
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: qrlora VERB [options]",
            "",
            "Adapters for text-to-image diffusion models that are made to be merged.",
            "",
            *lines,
            "",
            "qrlora VERB --help shows a verb's options. First try: qrlora blend --output demo",
        ]
    )
