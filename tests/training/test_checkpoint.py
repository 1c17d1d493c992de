"""Checkpoints: whole or not at all."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import write_safetensors
from qrlora.training.checkpoint import (
    checkpoint_folders,
    clear_leftovers,
    latest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)


def _save(output: Path, step: int) -> Path:
    state = {"param/a": torch.full((3,), float(step))}
    return save_checkpoint(output, step, {"seed": 1}, state, lambda path: write_safetensors(path, state))


def test_round_trip(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 10, 9):
        _save(tmp_path, step)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.record) == (10, {"seed": 1})
    assert found.tensors()["param/a"].tolist() == [10, 10, 10]
    assert open_checkpoint(tmp_path / "checkpoint-2").step == 2
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "adapter.safetensors",
        "state.json",
        "state.safetensors",
    ]


@pytest.mark.parametrize("damage", ["cut state", "no index", "cut index", "no adapter", "empty", "not json object"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    _save(tmp_path, 2)
    bad = _save(tmp_path, 4)
    if damage == "cut state":
        os.truncate(bad / "state.safetensors", (bad / "state.safetensors").stat().st_size - 1)
    elif damage == "no index":
        (bad / "state.json").unlink()
    elif damage == "cut index":
        os.truncate(bad / "state.json", 20)
    elif damage == "no adapter":
        (bad / "adapter.safetensors").unlink()
    elif damage == "not json object":
        (bad / "state.json").write_text(json.dumps([1]))
    else:
        shutil.rmtree(bad)
        bad.mkdir()
    with pytest.warns(QrloraWarning, match="checkpoint-4 is incomplete"):
        found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2
    with pytest.raises(QrloraError, match="checkpoint-4 is not a complete checkpoint"):
        open_checkpoint(bad)
    assert _save(tmp_path, 4) == bad
    assert open_checkpoint(bad).step == 4


@pytest.mark.parametrize("crash_at", range(1, 5))
def test_a_crash_while_writing_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """The process dies at one of the renames: three files, then the folder."""
    _save(tmp_path, 2)
    renames, real = 0, os.replace

    def dying(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        if renames == crash_at:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    monkeypatch.setattr(shutil, "rmtree", lambda *_args, **_kwargs: None)  # a dead process tidies nothing
    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path, 4)
    monkeypatch.undo()
    assert (tmp_path / ".checkpoint-4.tmp").is_dir()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-2"]
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        _save(tmp_path, step)
    prune_checkpoints(tmp_path, None)
    assert len(checkpoint_folders(tmp_path)) == 4
    prune_checkpoints(tmp_path, 2)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-3", "checkpoint-10"]


def test_leftovers_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / ".notes.tmp").write_text("mine")
    (tmp_path / ".losses.json.0a1b2c3d.tmp").write_text("half")
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".notes.tmp"]


def test_replacing_writes_anew(tmp_path: Path) -> None:
    folder = _save(tmp_path, 2)
    state = {"param/a": torch.zeros(3)}
    for replace, expected in ((False, 2.0), (True, 0.0)):
        save_checkpoint(tmp_path, 2, {"seed": 1}, state, lambda path: write_safetensors(path, state), replace=replace)
        assert open_checkpoint(folder).tensors()["param/a"].tolist() == [expected] * 3


def test_pruning_counts_complete_ones_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        _save(tmp_path, step)
    for step in (3, 5):
        (tmp_path / f"checkpoint-{step}" / "state.json").unlink()
    prune_checkpoints(tmp_path, 2)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "state.json").unlink()
    prune_checkpoints(tmp_path, 2)
    assert len(checkpoint_folders(tmp_path)) == 3
