"""kill -9 at any moment: a resumed run ends with the bits of an uninterrupted one."""

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from qrlora.errors import QrloraWarning
from qrlora.models import LoadedModel
from qrlora.training import train
from tests.training.conftest import MakeConfig

CHILD = """
import os, signal, sys
from qrlora.training import TrainConfig, train
from qrlora.training import checkpoint

step, moment = int(sys.argv[2]), sys.argv[3]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def on_step(done, total):
    if done == step and moment == "between steps":
        die()
    if done == step and moment == "in a checkpoint":  # the next one: two of its three files are written
        checkpoint.json = type("dying", (), {"dumps": die, "loads": checkpoint.json.loads})

train(TrainConfig.from_yaml(sys.argv[1]), on_step=on_step, progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("moment", ["between steps", "in a checkpoint"])
def test_killed_and_resumed(make_config: MakeConfig, model: LoadedModel, tmp_path: Path, moment: str) -> None:
    step = random.SystemRandom().randrange(1, 8)
    options = {"max_train_steps": 10, "checkpointing_steps": 3, "checkpoints_total_limit": 2}
    whole = train(make_config(**options, output_dir=str(tmp_path / "whole")), loaded=model, progress=False)
    given = make_config(**options).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "config.yaml"), str(step), moment],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == -9, child.stderr
    out = tmp_path / "out"
    assert not (out / "adapter.safetensors").exists()
    if moment == "in a checkpoint":
        assert [path for path in out.iterdir() if path.name.endswith(".tmp")]
    with warnings.catch_warnings():
        # Killed before its first checkpoint, the run starts over, and says so.
        warnings.filterwarnings("ignore", message="no checkpoint in", category=QrloraWarning)
        resumed = train(make_config(**options, resume="latest"), loaded=model, progress=False)
    assert resumed.path.read_bytes() == whole.path.read_bytes(), f"killed after step {step}"
    assert resumed.losses == whole.losses
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
