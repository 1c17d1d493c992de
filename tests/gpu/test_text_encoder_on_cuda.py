"""Text encoders trained on CUDA, where pictures and captions come from the computer's memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qrlora import starter
from qrlora.formats import read_adapter
from qrlora.training import TrainConfig, TrainResult, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]


def _run(folder: Path, output: Path, **changes: Any) -> TrainResult:
    values: dict[str, Any] = {
        "model": str(folder),
        "instance_data_dir": str(starter.samples().content),
        "instance_prompt": "a <c>",
        "output_dir": str(output),
        "max_train_steps": 3,
        "train_batch_size": 2,
        "train_text_encoder": True,
        "mixed_precision": "no",
        "learning_rate": 1e-4,
    }
    return train(TrainConfig.parse(values | changes), progress=False)


@pytest.mark.parametrize("kind", ["tiny_flux", "tiny_sd3", "tiny_sdxl"])
def test_losses_are_those_of_the_cpu(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    losses = {device: _run(folder, tmp_path / device, device=device).losses for device in ("cpu", "cuda")}
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"offload": "blocks", "encoder_offload": "blocks"}], ids=str)
def test_bf16_with_validation_and_resume(tiny_sdxl: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    more = {
        "mixed_precision": "bf16",
        "device": "cuda",
        "validation_prompt": "a <c>",
        "checkpointing_steps": 2,
    } | options
    whole = _run(tiny_sdxl, tmp_path / "whole", **more)
    resumed = _run(tiny_sdxl, tmp_path / "on", **more, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-2)
    for companion in read_adapter(whole.path).companions.values():
        assert any(bool(pair.A.any()) for pair in companion.layers.values())
