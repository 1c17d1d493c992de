"""The run's folder: what may be started, continued or must not be written over."""

import json
import math
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import atomic_write, read_metadata
from qrlora.training.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    clear_leftovers,
    later_checkpoints,
    latest_checkpoint,
    open_checkpoint,
    remove_folder,
)
from qrlora.training.config import TrainConfig
from qrlora.training.record import check_same_run

RESULT, CONFIG, LOSSES = "adapter.safetensors", "config.yaml", "losses.json"


def find_start(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint to continue from, None to start at step 0; reads only.

    Raises:
        QrloraError: a new run into a folder that holds another one, without `overwrite`.
    """
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise QrloraError(f"output_dir: {output} is a file; name a folder.")
    if config.resume == "latest":
        return _newest(output, overwrite=config.overwrite)
    start = None if config.resume is None else open_checkpoint(Path(config.resume))
    if not config.overwrite:
        if start is None or not start.within(output):
            _refuse_occupied(output)
        else:
            _refuse_going_back(start, output)
    return start


def _newest(output: Path, *, overwrite: bool) -> Checkpoint | None:
    folders = checkpoint_folders(output)
    start = latest_checkpoint(output)
    if start is not None or (output / RESULT).exists():
        return start  # a finished run is looked at by finished_losses
    if folders and not overwrite:
        raise QrloraError(f"cannot resume: no checkpoint in {output} is complete; set overwrite: true to train anew.")
    if not folders:
        warnings.warn(f"no checkpoint in {output}; starting at step 0", QrloraWarning, stacklevel=3)
    return None


def _refuse_going_back(start: Checkpoint, output: Path) -> None:
    """An earlier checkpoint of the same folder: what came after it would be written over."""
    newest = checkpoint_folders(output)[-1]
    if (output / RESULT).exists():
        what = "its run is finished"
    elif newest.name != start.folder.resolve().name:
        what = f"its run went on to {newest.name}"
    else:
        return
    raise QrloraError(
        f"resume: {start.folder} lies in output_dir, and {what}; use resume: latest, name another output_dir, or set "
        "overwrite: true."
    )


def _refuse_occupied(output: Path) -> None:
    if (output / RESULT).exists():
        what, way = "a finished result", "name another output_dir, or set overwrite: true"
    elif checkpoint_folders(output):
        what, way = "checkpoints of an unfinished run", "continue it with resume: latest, or set overwrite: true"
    else:
        return
    raise QrloraError(f"output_dir: {output} holds {what}; {way}.")


def finished_losses(config: TrainConfig, record: Mapping[str, Any], start: Checkpoint | None) -> list[float] | None:
    """The losses of a run that `resume` finds finished, None where there is something to do.

    Raises:
        QrloraError: the folder holds the result of another run, or of more or fewer steps with nothing to go on from.
    """
    result = Path(config.output_dir) / RESULT
    if config.resume != "latest" or not result.exists():
        return None
    try:
        then = json.loads(read_metadata(result)["qrlora"])["training"]["record"]
    except (KeyError, TypeError, ValueError) as error:
        raise QrloraError(
            f"cannot resume: {result} is not the result of a training run; name another output_dir."
        ) from error
    check_same_run(record, then, str(result))
    if then["max_train_steps"] == config.max_train_steps:
        return read_losses(result.with_name(LOSSES))
    if then["max_train_steps"] > config.max_train_steps or start is None:
        raise QrloraError(
            f"cannot resume: {result} is finished after {then['max_train_steps']} steps and max_train_steps is "
            f"{config.max_train_steps}, with no checkpoint to go on from; set overwrite: true to train anew."
            if start is None
            else f"cannot resume: {result} already took {then['max_train_steps']} steps, more than max_train_steps="
            f"{config.max_train_steps}; raise it, or use the checkpoint at the step you want."
        )
    return None


def told_kept(output: Path) -> str:
    """What a run that ends now can be continued from, for a message."""
    found = latest_checkpoint(output)
    if found is None:
        return "no checkpoint was written yet."
    return f"the last complete checkpoint is {found.folder}; continue with resume: latest (--resume latest)."


def prepare_folder(config: TrainConfig) -> Path:
    """Make the folder and clear what a killed run left half-written; what is complete stays, see `outdated_by`."""
    output = Path(config.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QrloraError(f"output_dir: {output} cannot be made: {error.strerror or error}.") from error
    clear_leftovers(output)
    # resume and overwrite are orders, not settings: without them the file can be run again as it is
    settled = config.model_copy(update={"resume": None, "overwrite": False})
    atomic_write(output / CONFIG, settled.to_yaml())
    return output


def outdated_by(config: TrainConfig, start: Checkpoint | None) -> list[Path]:
    """What a run with `overwrite` replaces: of another run everything, of its own what is later than its `start`.

    It is all there is until the run has written something newer, so `forget` waits for that.
    """
    output = Path(config.output_dir)
    own = start is not None and start.within(output)
    if not config.overwrite or (own and config.resume == "latest"):
        return []
    step = start.step if start is not None and own else -1
    return [*later_checkpoints(output, step), output / RESULT, output / LOSSES]


def forget(outdated: list[Path], *, keep: Collection[str]) -> None:
    """Remove what `outdated_by` found, but for the names that were just written."""
    for path in outdated:
        if path.name in keep:
            continue
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)


def write_losses(output: Path, losses: list[float], norms: list[float]) -> None:
    """`losses.json`: the mean loss and the gradient's norm before clipping, one entry an optimiser step."""
    atomic_write(output / LOSSES, json.dumps({"loss": losses, "grad_norm": norms}))


def read_losses(path: Path) -> list[float]:
    """The losses of a finished run.

    Raises:
        QrloraError: missing or damaged.
    """
    try:
        losses = [float(loss) for loss in json.loads(path.read_text(encoding="utf-8"))["loss"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QrloraError(f"{path} cannot be read; set overwrite: true to train anew.") from error
    if not all(math.isfinite(loss) for loss in losses):
        raise QrloraError(f"{path} holds losses that are not finite; set overwrite: true to train anew.")
    return losses
