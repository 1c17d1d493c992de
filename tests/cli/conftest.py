"""A folder to run commands in: pictures, a tiny model and an adapter."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qrlora import starter
from qrlora.cli import main

Run = Callable[[str], int]


@pytest.fixture
def desk(tmp_path: Path, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the tiny model as the embedded base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "path", lambda: tiny_flux, raising=False)
    generator = np.random.default_rng(0)
    for name in ("dog", "ink"):
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), np.uint8)).save(f"{name}.png")
    return tmp_path


@pytest.fixture
def run(desk: Path) -> Run:
    """Run a command line there; words are split at spaces, `_` within quotes stands for a space."""
    return lambda line: main([word.replace("_", " ") if "<" in word else word for word in line.split()])


@pytest.fixture
def adapter(run: Run, desk: Path) -> Path:
    """Trained for two steps."""
    assert (
        run("train --instance-data-dir dog.png --instance-prompt a_<c>_dog --output-dir dog --max-train-steps 2") == 0
    )
    return desk / "dog" / "adapter.safetensors"
