"""A model, a picture and a configuration that trains in a fraction of a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qrlora.models import LoadedModel, load_pipeline
from qrlora.training import TrainConfig

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def model(tiny_flux: Path) -> LoadedModel:
    """Shared by the tests: `train` gives it back as it was."""
    return load_pipeline(tiny_flux)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures, one with a mask of its own."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, channels in (("a", 3), ("b", 4), ("c", 3)):
        Image.fromarray(generator.integers(0, 256, (40, 36, channels), np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def make_config(tmp_path: Path, pictures: Path, tiny_flux: Path) -> MakeConfig:
    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "model": str(tiny_flux),
            "instance_data_dir": str(pictures),
            "instance_prompt": "a <c> dog",
            "output_dir": str(tmp_path / "out"),
            "max_train_steps": 6,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "checkpointing_steps": 2,
        }
        return TrainConfig.parse(values | changes)

    return make
