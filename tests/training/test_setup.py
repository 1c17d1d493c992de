"""In which precision a run computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qrlora.training.checkpoint import Checkpoint
from qrlora.training.setup import choose_precision, load_model
from tests.training.conftest import MakeConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _checkpoint(precision: str) -> Checkpoint:
    return Checkpoint(Path("checkpoint-2"), 2, {"mixed_precision": precision}, torch.__version__)


@pytest.mark.parametrize(
    ("given", "then", "defaults", "device", "expected"),
    [
        ({}, None, {}, CPU, "no"),
        ({}, None, {}, CUDA, "bf16"),
        ({}, None, {"mixed_precision": "no"}, CUDA, "no"),
        ({}, None, {"mixed_precision": "bf16", "rank": 4}, CPU, "bf16"),
        ({"mixed_precision": "bf16"}, None, {"mixed_precision": "no"}, CPU, "bf16"),
        ({"mixed_precision": "no"}, None, {"mixed_precision": "bf16"}, CUDA, "no"),
        ({}, "no", {}, CUDA, "no"),
        ({}, "bf16", {"mixed_precision": "no"}, CPU, "bf16"),
        ({"mixed_precision": "no"}, "bf16", {}, CUDA, "no"),
    ],
)
def test_who_decides(
    make_config: MakeConfig,
    given: dict[str, Any],
    then: str | None,
    defaults: dict[str, Any],
    device: torch.device,
    expected: str,
) -> None:
    start = None if then is None else _checkpoint(then)
    assert choose_precision(make_config(**given), defaults, device, start) == expected


def test_the_base_is_loaded_in_what_was_decided(make_config: MakeConfig, tiny_flux: Path, tmp_path: Path) -> None:
    """Loading happens on the CPU whatever the device, so CUDA can be asked about without one."""
    folder = shutil.copytree(tiny_flux, tmp_path / "model")
    settings = json.loads((folder / "qrlora.json").read_text())
    settings["training"]["mixed_precision"] = "no"
    (folder / "qrlora.json").write_text(json.dumps(settings))
    for start, dtype, precision in ((None, torch.float32, "no"), (_checkpoint("bf16"), torch.bfloat16, "bf16")):
        loaded, config = load_model(make_config(model=str(folder)), None, CUDA, start)
        loaded.load_denoiser("cpu")
        assert loaded.denoiser.dtype == dtype
        assert config.mixed_precision == precision
