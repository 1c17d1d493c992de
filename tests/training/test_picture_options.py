"""Buckets, crops, repeats and data sets, through the whole loop."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.errors import QrloraError
from qrlora.formats import read_safetensors
from qrlora.models import LoadedModel
from qrlora.models.sdxl import StableDiffusionXL
from qrlora.training import Interrupted, TrainConfig, split, train
from tests.training.conftest import MakeConfig


def _run(config: TrainConfig, model: LoadedModel, **more: Any) -> bytes:
    return train(config, loaded=model, progress=False, **more).path.read_bytes()


def _coefficients(path: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(path)[0]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Two squares, a tall and a wide picture, one with a mask."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, (height, width) in {"a": (40, 40), "b": (33, 35), "c": (66, 40), "d": (30, 50)}.items():
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((66, 40), np.uint8)
    mask[30:40] = 255
    Image.fromarray(mask).save(folder / "c.mask.png")
    return folder


def test_every_batch_is_of_one_bucket(
    make_config: MakeConfig, model: LoadedModel, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    real = model.family.predict

    def spy(denoiser: Any, noisy: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(noisy.shape))
        return real(denoiser, noisy, *rest)

    monkeypatch.setattr(type(model.family), "predict", lambda _, *given: spy(*given))
    buckets = "32,32;48,32;32,48"
    _run(make_config(instance_data_dir=str(shapes), aspect_ratio_buckets=buckets, max_train_steps=8), model)
    # a cycle is 4 batches: two of squares, one tall, one wide
    for cycle in (seen[:4], seen[4:]):
        assert sorted(cycle) == [(2, 4, 4, 4), (2, 4, 4, 4), (2, 4, 4, 6), (2, 4, 6, 4)]


def test_a_single_bucket_is_the_square_run(
    make_config: MakeConfig, model: LoadedModel, shapes: Path, tmp_path: Path
) -> None:
    plain = make_config(instance_data_dir=str(shapes), output_dir=str(tmp_path / "plain"))
    bucket = make_config(instance_data_dir=str(shapes), aspect_ratio_buckets="32,32")
    _run(plain, model)
    _run(bucket, model)
    one, other = (_coefficients(tmp_path / name / "adapter.safetensors") for name in ("plain", "out"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "options",
    [
        {"aspect_ratio_buckets": "32,32;48,32;32,48", "random_flip": True, "repeats": 3},
        {"center_crop": False, "random_crops": 3, "seed": 4},
        {"aspect_ratio_buckets": "auto", "center_crop": False, "gradient_accumulation_steps": 2, "random_flip": True},
    ],
    ids=["buckets", "crops", "both"],
)
def test_resumed_is_uninterrupted(
    make_config: MakeConfig, model: LoadedModel, shapes: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {"instance_data_dir": str(shapes), **options}
    whole = _run(make_config(**options, output_dir=str(tmp_path / "whole")), model)

    def interrupt(done: int, _total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        _run(make_config(**options), model, on_step=interrupt)
    changed = {"repeats": 2, "center_crop": not options.get("center_crop", True), "aspect_ratio_buckets": "64,64"}
    for key, value in changed.items():
        with pytest.raises(QrloraError, match=f"{key} differs from that run"):
            _run(make_config(**options | {key: value}, resume="latest"), model)
    assert _run(make_config(**options, resume="latest"), model) == whole


def test_crops_are_drawn_among_those_cached(
    make_config: MakeConfig, model: LoadedModel, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    real = split.draw

    def spy(*given: Any, **more: Any) -> Any:
        drawn = real(*given, **more)
        rows.extend(drawn.rows.tolist())
        return drawn

    monkeypatch.setattr(split, "draw", spy)
    options = {"center_crop": False, "random_crops": 3, "random_flip": True, "max_train_steps": 60}
    _run(make_config(instance_data_dir=str(shapes), **options), model)
    # 4 pictures, each in 3 crops plain and mirrored; 120 draws
    assert set(rows) == set(range(24))
    assert np.bincount([row % 4 for row in rows]).tolist() == [30] * 4


def test_sdxl_is_told_of_every_crop(
    make_config: MakeConfig, shapes: Path, tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training each row's size, corner and target reach the network, those of class pictures too."""
    told: list[tuple[int, ...]] = []
    real = StableDiffusionXL.predict

    def spy(self: Any, denoiser: Any, noisy: torch.Tensor, levels: Any, conditioning: Any, guidance: float) -> Any:
        if torch.is_grad_enabled():
            sides = tuple(8 * side for side in noisy.shape[-2:])
            told.extend((*sides, *map(int, row)) for row in conditioning["time_ids"].tolist())
        return real(self, denoiser, noisy, levels, conditioning, guidance)

    monkeypatch.setattr(StableDiffusionXL, "predict", spy)
    config = make_config(
        model=str(tiny_sdxl),
        instance_data_dir=str(shapes),
        aspect_ratio_buckets="32,32;48,32;32,48",
        center_crop=False,
        random_crops=4,
        random_flip=True,
        with_prior_preservation=True,
        class_data_dir=str(tmp_path / "class"),
        class_prompt="a photo of a dog",
        num_class_images=1,
        max_train_steps=12,
    )
    train(config, progress=False)
    files = {(40, 40): (32, 32), (33, 35): (32, 32), (66, 40): (48, 32), (30, 50): (32, 48), (32, 32): (32, 32)}
    assert len(told) == 12 * 2 * 2
    assert {(row[2], row[3]) for row in told} == set(files)
    for row in told:
        original, corner, target = row[2:4], row[4:6], row[6:8]
        assert row[:2] == target == files[original]
        # the picture resampled so that its crop is the target leaves this much room for the corner
        scale = max(target[0] / original[0], target[1] / original[1])
        for at, full, side in zip(corner, original, target, strict=True):
            assert 0 <= at <= round(full * scale) - side + 1
    assert len({row[4:6] for row in told if row[2:4] == (30, 50)}) > 1


def test_a_bucket_that_the_model_cannot_have(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match=r"aspect_ratio_buckets: 40,32 must be multiples of 16"):
        _run(make_config(aspect_ratio_buckets="32,32;40,32"), model)
    with pytest.raises(QrloraError, match=r"'64' is no \"height,width\""):
        make_config(aspect_ratio_buckets="64")
    assert not (tmp_path / "out").exists()


def test_a_data_set_trains_as_its_folder_does(
    make_config: MakeConfig, model: LoadedModel, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    (shapes / "c.mask.png").unlink()
    lines = [{"file_name": f"{name}.png", "text": f"a <c> {name}"} for name in "abcd"]
    (shapes / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = make_config(instance_data_dir=str(shapes), output_dir=str(tmp_path / "folder"))
    given = {"instance_data_dir": None, "dataset_name": str(shapes), "caption_column": "text"}
    assert _run(make_config(**given), model) == _run(folder, model)
    # pictures are compared by what is in them, wherever they are
    more = {"max_train_steps": 8, "output_dir": str(tmp_path / "folder"), "resume": "latest"}
    _run(make_config(**given, **more), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_data_dir": None}, r"instance_data_dir is missing: give a picture .*, or dataset_name"),
        ({"dataset_name": "a/b"}, "instance_data_dir and dataset_name exclude each other"),
        ({"caption_column": "text"}, "caption_column=text is about a data set, but dataset_name is not given"),
        ({"dataset_config_name": "small"}, "dataset_config_name=small is about a data set"),
        ({"repeats": 0}, "repeats=0 is not valid"),
        ({"random_crops": 0}, "random_crops=0 is not valid"),
        ({"aspect_ratio_bucket": "auto"}, r"unknown key aspect_ratio_bucket; did you mean aspect_ratio_buckets\?"),
    ],
)
def test_settings_that_do_not_go_together(make_config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QrloraError, match=message):
        make_config(**changes)


def test_a_typo_in_the_only_source_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match=r"unknown key instance_data_dri; did you mean instance_data_dir\?"):
        TrainConfig.parse({"instance_data_dri": "x", "output_dir": "y"})
