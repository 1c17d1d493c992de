"""Checkpoints: a folder `checkpoint-STEP` that is there whole or not at all, of safetensors and JSON alone.

adapter.safetensors   the adapter at that step, an ordinary adapter file
state.safetensors     coefficients (fp32), optimiser states and moving averages, losses and gradient norms so far, and
                      frozen tensors that the adapter file does not hold to the last bit
state.json            step, what makes the run the same run, sizes of the files above
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import atomic_write, read_safetensors, write_safetensors

ADAPTER, STATE, INDEX = "adapter.safetensors", "state.safetensors", "state.json"
CURVES = "curves"
KEPT = "kept/"
VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(
    r"\.(checkpoint-\d+|(adapter\.safetensors|config\.yaml|losses\.json|README\.md|step-\d+-\d+\.png)\.[0-9a-f]+)\.tmp"
)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: `step` optimiser steps were taken under `record`."""

    folder: Path
    step: int
    record: Mapping[str, Any]
    torch_version: str

    @property
    def adapter(self) -> Path:
        """The adapter at that step."""
        return self.folder / ADAPTER

    def within(self, output: Path) -> bool:
        """Whether it is a checkpoint of the run in `output`."""
        return self.folder.resolve().parent == output.resolve()

    def tensors(self) -> dict[str, Tensor]:
        """Everything in `state.safetensors`."""
        return read_safetensors(self.folder / STATE)[0]


def save_checkpoint(
    output: Path,
    step: int,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    save_adapter_to: Callable[[Path], object],
    *,
    replace: bool = False,
) -> Path:
    """Write `checkpoint-STEP`, complete, by renaming a finished folder into place.

    Args:
        output: the run's folder.
        step: optimiser steps taken.
        record: from `record_of`.
        tensors: for `state.safetensors`.
        save_adapter_to: writes the adapter to a path.
        replace: write anew what is complete already.
    """
    folder = output / f"checkpoint-{step}"
    if not replace and _read(folder) is not None:
        return folder  # a resumed run comes by again with the same bits
    unfinished = output / f".checkpoint-{step}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        save_adapter_to(unfinished / ADAPTER)
        write_safetensors(unfinished / STATE, tensors)
        index = {
            "version": VERSION,
            "step": step,
            "record": dict(record),
            "torch": torch.__version__,
            "bytes": {name: (unfinished / name).stat().st_size for name in (ADAPTER, STATE)},
        }
        atomic_write(unfinished / INDEX, json.dumps(index, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # an earlier one goes only now
        os.replace(unfinished, folder)
    except OSError as error:
        raise QrloraError(f"{folder} cannot be written: {error.strerror or error}.") from error
    except QrloraError as error:
        # Told of files in a folder that will be gone when this is read.
        raise QrloraError(str(error).replace(str(unfinished), str(folder))) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _sync(output)
    return folder


def latest_checkpoint(output: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run's folder; damaged ones are passed over with a warning."""
    for folder in reversed(checkpoint_folders(output)):
        found = _read(folder)
        if found is not None:
            return found
        warnings.warn(f"{folder} is incomplete and is passed over.", QrloraWarning, stacklevel=2)
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint named by the user.

    Raises:
        QrloraError: no checkpoint there, or an incomplete one.
    """
    found = _read(folder)
    if found is None:
        raise QrloraError(f'resume: {folder} is not a complete checkpoint folder; name another, or "latest".')
    return found


def checkpoint_folders(output: Path) -> list[Path]:
    """`checkpoint-STEP` folders by step, complete or not."""
    return [path for _, path in _by_step(output)]


def later_checkpoints(output: Path, step: int) -> list[Path]:
    """`checkpoint-STEP` folders of more steps than `step`, complete or not."""
    return [path for taken, path in _by_step(output) if taken > step]


def _by_step(output: Path) -> list[tuple[int, Path]]:
    if not output.is_dir():
        return []
    return sorted((int(match[1]), path) for path in output.iterdir() if (match := _NAME.fullmatch(path.name)))


def prune_checkpoints(output: Path, limit: int | None) -> None:
    """Remove all but the `limit` newest complete ones, and damaged ones that are older than the newest of those."""
    if limit is None:
        return
    folders = checkpoint_folders(output)
    complete = [folder for folder in folders if _is_complete(folder)]
    if not complete:
        return
    for folder in folders[: folders.index(complete[-1])]:
        if folder not in complete[-limit:]:
            remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Out of sight first, so that a crash while deleting never leaves half a checkpoint under its name."""
    doomed = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(output: Path) -> None:
    """Remove what a killed run left half-written in its own folder."""
    for path in [*output.glob(".*.tmp"), *output.glob("validation/.step-*.tmp")]:
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _read(folder: Path) -> Checkpoint | None:
    """None unless every file is there at the size it was written with."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        complete = all((folder / name).stat().st_size == size for name, size in index["bytes"].items())
        if not complete or set(index["bytes"]) != {ADAPTER, STATE}:
            return None
        if index["version"] != VERSION:
            raise QrloraError(f"{folder} was written by another version of qrlora (format {index['version']}).")
        return Checkpoint(folder, int(index["step"]), index["record"], str(index["torch"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_complete(folder: Path) -> bool:
    try:
        return _read(folder) is not None
    except QrloraError:  # of another version: nothing here can go on from it
        return False


def _sync(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
