"""Two pictures and a blend of them on the tiny pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qrlora.blend import BlendConfig, BlendResult, blend
from qrlora.models import LoadedModel, load_pipeline

MakeConfig = Callable[..., BlendConfig]


@pytest.fixture(scope="session")
def model(tiny_flux: Path) -> LoadedModel:
    return load_pipeline(tiny_flux)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    generator = np.random.default_rng(0)
    for name in ("dog", "ink"):
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def make_config(pictures: Path, tiny_flux: Path) -> MakeConfig:
    def make(output: Path, **changes: Any) -> BlendConfig:
        values: dict[str, Any] = {
            "model": str(tiny_flux),
            "content": pictures / "dog.png",
            "content_prompt": "a photo of a <c> dog",
            "style": pictures / "ink.png",
            "style_prompt": "a cat in <s> style",
            "prompt": "a <c> dog in <s> style",
            "max_train_steps": 4,
            "learning_rate": 0.5,
            "content_weights": (0.0, 1.0),
            "style_weights": (0.0, 0.5, 1.0),
            "output": output,
        }
        return BlendConfig.model_validate(values | changes)

    return make


@pytest.fixture(scope="session")
def made(make_config: MakeConfig, model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> BlendResult:
    """A finished blend with a sweep; read only."""
    return blend(make_config(tmp_path_factory.mktemp("blend"), sweep_steps=2), loaded=model, progress=False)
