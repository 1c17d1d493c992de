"""The moving average: its recursion, where it is used, and that it goes on after a stop."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor

from qrlora.adapter import attach_adapter, remove_adapter, set_adapters
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter, read_safetensors
from qrlora.models import LoadedModel
from qrlora.training import Interrupted, TrainConfig, train
from tests.training.conftest import MakeConfig


def _run(config: TrainConfig, model: LoadedModel, **more: Any) -> bytes:
    return train(config, loaded=model, progress=False, **more).path.read_bytes()


def _states(folder: Path, kind: str) -> dict[str, Tensor]:
    tensors, _ = read_safetensors(folder / "state.safetensors")
    return {key.removeprefix(kind): value for key, value in tensors.items() if key.startswith(kind)}


@pytest.mark.parametrize("decay", [0.9999, 0.3])
def test_the_file_is_the_average_of_what_was_trained(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, decay: float
) -> None:
    """Computed again in float64 from the coefficients after each step, which a run without average leaves behind."""
    options = {"checkpointing_steps": 1, "adapter": {"lora_alpha": 8.0}}
    _run(make_config(**options, output_dir=str(tmp_path / "plain")), model)
    _run(make_config(**options, use_ema=True, ema_decay=decay), model)
    average: dict[str, Tensor] = {}
    for step in range(1, 7):
        kept = min(step / (9 + step), decay) if step > 1 else 0.0
        trained = _states(tmp_path / "plain" / f"checkpoint-{step}", "param/")
        for name, value in trained.items():
            average[name] = kept * average.get(name, value.double()) + (1 - kept) * value.double()
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        for name, value in _states(checkpoint, "param/").items():
            assert torch.equal(value, trained[name])  # the average does not touch the training
        for name, value in _states(checkpoint, "ema/").items():
            torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-8)
        for name, pair in read_adapter(checkpoint / "adapter.safetensors").layers.items():
            expected = 2 * average[f"{name}.lora_A.weight"]
            torch.testing.assert_close(pair.A.double(), expected, rtol=1e-5, atol=1e-8)
            assert int(pair.A.tril(-1).count_nonzero()) == 0
    result = read_adapter(tmp_path / "out" / "adapter.safetensors")
    for name, pair in result.layers.items():
        assert torch.equal(pair.A, read_adapter(checkpoint / "adapter.safetensors").layers[name].A)


@pytest.mark.parametrize("adapter", [{}, {"basis": "pissa"}, {"form": "core", "basis": "svd"}], ids=str)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    options = {"use_ema": True, "adapter": adapter}
    whole = _run(make_config(**options, output_dir=str(tmp_path / "whole")), model)

    def interrupt(done: int, _total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        _run(make_config(**options), model, on_step=interrupt)
    assert _run(make_config(**options, resume="latest"), model) == whole
    states = [(tmp_path / name / "checkpoint-6" / "state.safetensors").read_bytes() for name in ("whole", "out")]
    assert states[0] == states[1]
    for change in ({"use_ema": False}, {"use_ema": True, "ema_decay": 0.5}):
        with pytest.raises(QrloraError, match=f"cannot resume from .*: {list(change)[-1]} differs"):
            _run(make_config(adapter=adapter, resume="latest", **change), model)


def test_validation_pictures_and_trackers_show_the_average(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    """The last picture is the one that the resulting file makes, and the training goes on as without pictures."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"use_ema": True, "max_train_steps": 4, "learning_rate": 0.3}
    plain = _run(make_config(**options, output_dir=str(tmp_path / "plain")), model)
    seen = make_config(**options, report_to="tensorboard", validation_prompt="a <c> cat", validation_steps=2)
    assert _run(seen, model) == plain
    attach_adapter(model.denoiser, read_adapter(tmp_path / "out" / "adapter.safetensors"), "result")
    try:
        set_adapters(model.denoiser, {"result": 1.0})
        with Image.open(tmp_path / "out" / "validation" / "step-000004-0.png") as picture:
            about = json.loads(picture.info["qrlora"])
            expected = model.family.generate(model.pipeline, ["a <c> cat"], seeds=[0], **about["settings"])[0]
            assert ImageChops.difference(picture.convert("RGB"), expected).getbbox() is None
    finally:
        remove_adapter(model.denoiser, "result")
    events = EventAccumulator(str(next((tmp_path / "out" / "logs").rglob("events.out.tfevents.*")).parent))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [image.step for image in events.Images("validation")] == [2, 4]
