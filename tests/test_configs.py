"""Every shipped configuration: its command, its words and two steps of it on a small model of its family."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from qrlora.formats import read_adapter
from qrlora.models import load_pipeline
from qrlora.training import TrainConfig, train
from qrlora.training.memory import MEMORY_FIELDS, PRESETS
from tests.tiny_newer import save_flux2, save_flux2_klein, save_qwen_image, save_sd15, save_z_image
from tests.tiny_pipelines import save_flux, save_sd3, save_sdxl

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
# Billions of parameters of the full-size denoisers; tests/models holds that they are.
BILLIONS = {
    "flux2-dev": 32.2,
    "flux2-klein-4b": 3.9,
    "flux2-klein-9b": 9.1,
    "flux": 11.9,
    "qwen-image": 20.4,
    "sd15": 0.9,
    "sd3-medium": 2.0,
    "sd3.5-medium": 2.5,
    "sd3.5-large": 8.1,
    "sdxl": 2.6,
    "z-image": 6.2,
}
SAVE: dict[str, Callable[[Path], Path]] = {
    "flux-dev": lambda folder: save_flux(folder, guidance_embeds=True),
    "flux-schnell": save_flux,
    "sd3-medium": save_sd3,
    "sd3.5-medium": lambda folder: save_sd3(folder, dual_attention=True),
    "sd3.5-large": save_sd3,
    "sdxl": save_sdxl,
    "sd15": save_sd15,
    "flux2-dev": save_flux2,
    "flux2-klein-4b": save_flux2_klein,
    "flux2-klein-9b": save_flux2_klein,
    "qwen-image": save_qwen_image,
    "z-image": save_z_image,
}
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def _model(file: Path) -> str:
    return file.stem.rpartition("-")[0]


def test_every_model_has_configurations() -> None:
    assert {_model(file) for file in FILES} == set(SAVE)


@each_file
def test_the_first_line_is_the_command(file: Path) -> None:
    first = file.read_text(encoding="utf-8").splitlines()[0]
    verb, config, *options = shlex.split(first.removeprefix("# qrlora "))
    assert (verb, config) == ("train", f"configs/{file.name}")
    given = {key.removeprefix("--"): value for key, value in zip(options[::2], options[1::2], strict=True)}
    TrainConfig.from_yaml(file, given)


@each_file
def test_its_comment_tells_what_its_memory_means(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    config = TrainConfig.from_yaml(file)
    assert config.memory == file.stem.rpartition("-")[2]
    told = re.search(r"# For this card: (.+)", text)
    assert told is not None
    said = {key: yaml.safe_load(value) for key, _, value in (part.partition(": ") for part in told[1].split(", "))}
    billions = next(size for name, size in BILLIONS.items() if _model(file).startswith(name))
    row = next(row for most, row in sorted(PRESETS.items()) if billions <= most)
    assert said == dict(row[config.memory])
    assert set(said) == set(MEMORY_FIELDS)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "dog.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return path


@pytest.mark.filterwarnings("ignore")  # bitsandbytes and torchao speak on import and on a CPU
@each_file
def test_two_steps_on_a_small_model(file: Path, picture: Path, tmp_path: Path) -> None:
    model = SAVE[_model(file)](tmp_path / "model")
    changes = {
        "model": str(model),
        "instance_data_dir": str(picture),
        "output_dir": str(tmp_path / "out"),
        "resolution": 32,
        "adapter.rank": 2,
        "max_train_steps": 2,
        "gradient_accumulation_steps": 1,
        "validation_steps": 2,
        "device": "cpu",
    }
    config = TrainConfig.from_yaml(file, changes)
    result = train(config, progress=False)
    assert len(result.losses) == 2
    assert np.isfinite(result.losses).all()
    pairs = read_adapter(result.path).layers.values()
    assert any(bool(pair.A.any()) for pair in pairs)
    # What was resolved lies beside the result, and asks for the same again.
    resolved = TrainConfig.from_yaml(tmp_path / "out" / "config.yaml")
    assert resolved.gradient_checkpointing == result.config.gradient_checkpointing
    assert load_pipeline(model).family.name in file.stem.replace("sd3.5", "sd3")
