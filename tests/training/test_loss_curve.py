"""The loop against diffusers' public DreamBooth script for FLUX LoRA, whose recorded losses are data in the repository.

`benchmarks/loss_curve.py` compares whole curves; this is their beginning.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.loss_curve import GIVEN, LIKE_OURS, SCHEDULED, SCRIPT, WINDOW, noise, own_config, relative
from qrlora import starter
from qrlora.models import LoadedModel, load_pipeline
from qrlora.training import run as running
from qrlora.training import split, train

STEPS = WINDOW


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """What was recorded of the script."""
    return json.loads(SCRIPT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    """The base that the script was run on."""
    return load_pipeline(starter.path())


def _prefix(
    model: LoadedModel, settings: dict[str, Any], steps: int, output: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[float], str]:
    """Our first losses, and a hash of the noise levels drawn for them (whole numbers, the same on every machine)."""
    digest, real = hashlib.sha256(), split.draw

    def spy(*given: Any, **named: Any) -> Any:
        drawn = real(*given, **named)
        digest.update(drawn.index.numpy().tobytes())
        return drawn

    monkeypatch.setattr(split, "draw", spy)
    config = own_config(settings | {"max_train_steps": steps}, 0, output)
    return train(config, loaded=model, progress=False).losses, digest.hexdigest()


def test_given_the_same_draws_the_script_has_our_losses(
    script: dict[str, Any], embedded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same noise, levels and start: every loss is the same up to rounding. And their mean is within
    the noise of the script's seeds, each with draws of its own."""
    losses, drawn = _prefix(embedded, script["settings"], STEPS, tmp_path, monkeypatch)
    given = script["runs"][GIVEN]
    assert drawn == given["draws"], "what is drawn at a seed has changed, so the recorded curve does not apply"
    assert relative(losses, given["loss"]["0"][:STEPS]).max() < 1e-4
    theirs = [curve[:STEPS] for curve in script["runs"][LIKE_OURS]["loss"].values()]
    error = np.sqrt(noise(theirs)[0] / STEPS * (1 + 1 / len(theirs)))
    assert abs(np.mean(losses) - np.mean(theirs)) < 3 * error
    assert error < 0.01 * np.mean(losses)  # narrow enough to say something


def test_so_it_has_with_a_schedule_accumulation_weighting_and_clipping(
    script: dict[str, Any], embedded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm-up and the beginning of the cosine; the schedule is that of all its steps."""
    given = script["runs"][SCHEDULED]
    real = running.learning_rates
    monkeypatch.setattr(
        running,
        "learning_rates",
        lambda config: real(config.model_copy(update={"max_train_steps": given["settings"]["max_train_steps"]})),
    )
    losses, drawn = _prefix(embedded, script["settings"] | given["settings"], 12, tmp_path, monkeypatch)
    assert drawn == given["draws"], "what is drawn at a seed has changed, so the recorded curve does not apply"
    assert relative(losses, given["loss"]["0"][:12]).max() < 1e-4


def test_the_recorded_settings_are_the_scripts(script: dict[str, Any]) -> None:
    """Each setting that both know is handed to ours under its own name, so none is lost on the way."""
    settings = script["settings"]
    config = own_config(settings, 0, Path("out"))
    for key in ("train_batch_size", "learning_rate", "max_train_steps", "adam_weight_decay", "max_grad_norm"):
        assert getattr(config, key) == settings[key]
    assert (config.adapter.rank, config.adapter.lora_alpha, config.adapter.plain) == (16, 16, True)
    lengths = {(name, len(curve)) for name, run in script["runs"].items() for curve in run["loss"].values()}
    assert lengths == {(name, 40 if name == SCHEDULED else 300) for name in script["runs"]}
    assert (
        torch.tensor([curve for run in script["runs"].values() for curve in run["loss"].values() if len(curve) == 300])
        .isfinite()
        .all()
    )
