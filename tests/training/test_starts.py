"""Where a run starts from: another adapter's layers, or an earlier step of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qrlora.errors import QrloraError
from qrlora.models import LoadedModel
from qrlora.training import TrainConfig, train
from qrlora.training import run as running
from tests.training.conftest import MakeConfig


def _run(config: TrainConfig, model: LoadedModel, **more: Any) -> bytes:
    return train(config, loaded=model, progress=False, **more).path.read_bytes()


def test_starting_from_an_adapter_of_other_layers(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    """What the spec selects and what the file has must be the same layers, whichever is more."""
    few = {"target_modules": ["attn.to_q", "attn.to_k"]}
    first = train(make_config(max_train_steps=1, adapter=few), loaded=model, progress=False)
    elsewhere = {"init_from": str(first.path), "output_dir": str(tmp_path / "no"), "max_train_steps": 1}
    with pytest.raises(QrloraError, match=r"does not adapt \S*\.\S+, which adapter\.target_modules and .* mean;"):
        _run(make_config(**elsewhere), model)
    with pytest.raises(QrloraError, match=r"adapts \S*attn\.to_k, which adapter\.target_modules and .* do not mean;"):
        _run(make_config(**elsewhere, adapter={"target_modules": ["attn.to_q"]}), model)
    assert not (tmp_path / "no").exists()
    _run(make_config(**elsewhere, adapter=few), model)


@pytest.mark.parametrize("every", [1, 100], ids=["at a checkpoint", "at the end"])
def test_going_back_removes_what_came_later_once_there_is_something_newer(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    whole = _run(make_config(), model)
    real = running.loss_of
    back = make_config(
        resume=str(out / "checkpoint-2"), overwrite=True, checkpointing_steps=every, checkpoints_total_limit=2
    )

    def failing(*_given: Any) -> torch.Tensor:
        return real(*_given) * float("nan")

    monkeypatch.setattr(running, "loss_of", failing)
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "config.yaml"}
    with pytest.raises(QrloraError, match="not finite at step 2"):
        _run(back, model)
    assert {path: path.read_bytes() for path in kept} == kept
    monkeypatch.undo()

    states: list[tuple[int, list[str], bool]] = []

    def look(done: int, _total: int) -> None:
        folders = sorted(path.name for path in out.glob("checkpoint-*"))
        states.append((done, folders, (out / "adapter.safetensors").exists()))

    assert _run(back, model, on_step=look) == whole
    if every == 1:
        assert states[0] == (3, ["checkpoint-2", "checkpoint-3"], False)
        assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    else:
        assert states[-1] == (6, ["checkpoint-2", "checkpoint-4", "checkpoint-6"], True)
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (out / "losses.json").is_file()
