"""diffusers' and transformers' loaders: quiet, from safetensors alone, with what goes wrong as one sentence."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from qrlora.errors import QrloraError


def from_pretrained(source: str, dtype: torch.dtype, cls: type[Any], **extra: Any) -> Any:
    def load() -> Any:
        left_out = _left_out(Path(source)) if local and "subfolder" not in extra else {}
        # safetensors alone: nothing is ever unpickled
        return cls.from_pretrained(
            source, torch_dtype=dtype, local_files_only=local, use_safetensors=True, **left_out | extra
        )

    local = Path(source).is_dir()
    return told(source, load)


def told(source: str, load: Callable[[], Any]) -> Any:
    """What `load` gives; what goes wrong in the libraries below as one sentence."""
    try:
        with _no_loading_bars(), warnings.catch_warnings():
            # The libraries warn about each other's spellings while loading; none of it is the user's to mend.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return load()
    except QrloraError:
        raise
    except Exception as error:  # every library below raises its own kinds
        if Path(source).is_dir():
            raise QrloraError(f"the model folder {source} cannot be loaded: {first_line(error)}") from error
        raise QrloraError(
            f"the model {source} is neither a local folder nor to be had from the hub ({first_line(error)}); check "
            "its name, the network, and for a gated model that you are logged in (hf auth login)."
        ) from error


def _left_out(folder: Path) -> dict[str, None]:
    """Components that a pipeline was saved without, such as SD3's T5; diffusers wants to be told again."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {name: None for name, entry in index.items() if entry == [None, None]}


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """No bars, and none of transformers' advice to install what is not needed here."""
    switches = []
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    for logging in (diffusers_logging, transformers_logging):
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            switches.append(logging.enable_progress_bar)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        for switch in switches:
            switch()
