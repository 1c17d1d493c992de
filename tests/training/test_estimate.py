"""Estimates against what PyTorch's allocator counts in real training steps on the CPU.

The judge allows 15 %. Computation is the same, so most agree to a per cent; kernels that allocate for themselves (bf16
products, unpacking 4 bits) make up the rest.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora import starter
from qrlora.errors import QrloraError
from qrlora.models import read_blueprint
from qrlora.training import GIB as GIB_OF
from qrlora.training import TrainConfig, estimate, fitting_memory, train
from qrlora.training.estimate import CONTEXT_BYTES
from qrlora.training.memory import preset
from tests.tiny_newer import save_flux2_klein, save_qwen_image, save_z_image
from tests.tiny_pipelines import save_sd3, save_sdxl
from tests.training.measured import measured_encoding, measured_step

# torchao and bitsandbytes, of missing kernels
pytestmark = pytest.mark.filterwarnings("ignore")
GIB = 2**30
SAVE: dict[str, Callable[[Path], Path]] = {
    "sd3": save_sd3,
    "sdxl": save_sdxl,
    "flux2-klein": save_flux2_klein,
    "qwen-image": save_qwen_image,
    "z-image": save_z_image,
}
# What no setting makes fit.
TOO_SMALL = {"flux2-dev": ("6gb", "8gb")}
LARGE_BATCH = {"train_batch_size": 16}
# Of the embedded base: 36 MB of weights in fp32, and activations that grow with the batch.
CASES: dict[str, dict[str, Any]] = {
    "weights above all": {"train_batch_size": 1, "adapter.rank": 4},
    "activations above all": LARGE_BATCH,
    "checkpointing": LARGE_BATCH | {"gradient_checkpointing": True},
    "bf16 and checkpointing": LARGE_BATCH | {"mixed_precision": "bf16", "gradient_checkpointing": True},
    "nf4 in bf16": {"train_batch_size": 8, "quantization": "nf4", "mixed_precision": "bf16"},
    "int8": {"train_batch_size": 2, "quantization": "int8"},
    "fp8 and checkpointing": {"train_batch_size": 2, "quantization": "fp8", "gradient_checkpointing": True},
    "streamed": {"train_batch_size": 1, "offload": "blocks"},
    "streamed nf4": {"train_batch_size": 2, "offload": "blocks", "quantization": "nf4"},
    "states and gradients": {
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "adapter.basis": "lora",
        "adapter.rank": 128,
    },
}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return path


def config_for(model: Path, picture: Path, **more: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": str(model),
        "instance_data_dir": str(picture),
        "instance_prompt": "a dog",
        "output_dir": str(picture.parent / "out"),
        "max_train_steps": 2,
        "device": "cpu",
        "mixed_precision": "no",
        "adapter.rank": 8,
    }
    return TrainConfig.parse(values | more)


def ratio(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> float:
    assert config.model is not None
    with measured_step(monkeypatch) as peaks:
        train(config, progress=False)
    found = estimate(config, read_blueprint(config.model))
    assert found.context == 0
    return found.phases[1].total / peaks[0]


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_takes_what_was_estimated(case: str, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ratio(config_for(starter.path(), picture, **CASES[case]), monkeypatch)
    assert 0.9 < found < 1.1, found


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("sd3", {}),
        ("sd3", {"gradient_checkpointing": True}),
        ("sdxl", {}),
        ("sdxl", {"offload": "blocks"}),
        ("flux2-klein", {}),
        ("qwen-image", {}),
        ("z-image", {"gradient_checkpointing": True}),
    ],
)
def test_so_it_is_for_every_family(
    family: str, more: dict[str, Any], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SAVE[family](tmp_path / family)
    # A caption as long as can be: where short ones take less, that is what is counted.
    values = {"train_batch_size": 64, "adapter.rank": 4, "instance_prompt": "a dog" * 20, **more}
    found = ratio(config_for(model, picture, **values), monkeypatch)
    assert 0.9 < found < 1.1, found


@pytest.mark.parametrize("offload", ["none", "blocks"])
def test_encoding_takes_what_was_estimated(offload: str, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(starter.path(), picture, encoder_offload=offload, resolution=64)
    with measured_encoding(monkeypatch) as peaks:
        train(config, progress=False)
    assert 0.85 < estimate(config, read_blueprint(starter.path())).phases[0].total / peaks[0] < 1.15


def test_flux_dev_within_nine_and_six_gib() -> None:
    """The targets: NF4 with everything on the card within 9 GiB, with streamed blocks within 6. An estimate."""
    results = json.loads(Path("benchmarks/results/memory.json").read_text(encoding="utf-8"))
    rows = {row["memory"]: row for row in results["memory"]["512"]["flux-dev"]}
    assert (rows["12gb"]["settings"]["quantization"], rows["12gb"]["settings"]["offload"]) == ("nf4", "none")
    assert rows["12gb"]["peak"] < 9 * GIB
    assert rows["6gb"]["settings"]["offload"] == "blocks"
    assert rows["6gb"]["peak"] < 6 * GIB
    for model in ("sd3.5-medium", "sdxl"):
        row = next(row for row in results["memory"]["512"][model] if row["memory"] == "6gb")
        assert row["peak"] < 6 * GIB


@pytest.mark.parametrize("resolution", ["512", "1024"])
def test_every_preset_fits_its_card(resolution: str) -> None:
    results = json.loads(Path("benchmarks/results/memory.json").read_text(encoding="utf-8"))
    for model, rows in results["memory"][resolution].items():
        denoiser = read_blueprint(model).denoiser
        assert [row["memory"] for row in rows] == list(GIB_OF)
        for row in rows:
            assert row["settings"] == preset(row["memory"], denoiser)
            if (size := GIB_OF[row["memory"]]) is not None and row["memory"] not in TOO_SMALL.get(model, ()):
                assert row["peak"] < size * GIB, (model, row["memory"])


def test_the_committed_estimate_is_this_estimate() -> None:
    results = json.loads(Path("benchmarks/results/memory.json").read_text(encoding="utf-8"))
    row = next(row for row in results["memory"]["512"]["sd3-medium"] if row["memory"] == "6gb")
    values = {"instance_data_dir": "x", "output_dir": "y", "resolution": 512, "adapter.rank": results["rank"]}
    found = estimate(TrainConfig.parse(values | row["settings"]), read_blueprint("sd3-medium"))
    assert found.peak == pytest.approx(row["peak"], rel=0.02)  # another torch may save a tensor more or less
    assert found.context == CONTEXT_BYTES


def test_the_memory_setting_that_fits_is_named(picture: Path) -> None:
    config = config_for(starter.path(), picture, train_batch_size=64, device="cuda", mixed_precision="bf16")
    blueprint = read_blueprint(starter.path())
    fast, small = (estimate(config_with(config, memory=memory), blueprint) for memory in ("max", "6gb"))
    assert small.peak < fast.peak
    assert fitting_memory(config, blueprint, fast.peak / GIB) == ("max", fast)
    assert fitting_memory(config, blueprint, (small.peak + fast.peak) / 2 / GIB) == ("6gb", small)
    assert fitting_memory(config, blueprint, 0.1) is None


def config_with(config: TrainConfig, **more: Any) -> TrainConfig:
    return TrainConfig.parse({name: getattr(config, name) for name in config.model_fields_set} | more)


def test_nothing_is_allocated_and_nothing_stays() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    estimate(config_for(starter.path(), Path("a.png")), read_blueprint(starter.path()))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(torch.zeros(1)) is torch.Tensor


def test_a_training_after_an_estimate_has_numbers(picture: Path) -> None:
    """A size that nothing else here has: what is remembered of it was made without numbers."""
    config = config_for(starter.path(), picture, resolution=48, max_train_steps=1)
    estimate(config, read_blueprint(starter.path()))
    (loss,) = train(config, progress=False).losses
    assert loss > 0


def test_an_adapter_of_unknown_size_is_said() -> None:
    config = config_for(starter.path(), Path("a.png"), **{"adapter.experts": 4})
    with pytest.raises(QrloraError, match="a gated adapter needs is not known before"):
        estimate(config, read_blueprint(starter.path()))
