"""Prior preservation: class pictures drawn by the base, and their loss beside the instance's."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from qrlora.adapter import AdapterSpec, add_adapter, remove_adapter, set_adapters
from qrlora.blend.provenance import read_provenance
from qrlora.data import load_examples
from qrlora.errors import QrloraError
from qrlora.models import LoadedModel
from qrlora.training import TrainConfig, train
from qrlora.training import run as running
from tests.training.conftest import MakeConfig

PROMPT = "a photo of a dog"


@pytest.fixture
def make_prior(make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    def make(**changes: Any) -> TrainConfig:
        return make_config(
            **{
                "with_prior_preservation": True,
                "class_data_dir": str(tmp_path / "class"),
                "class_prompt": PROMPT,
                "num_class_images": 3,
            }
            | changes
        )

    return make


def _run(config: TrainConfig, model: LoadedModel, **more: Any) -> bytes:
    return train(config, loaded=model, progress=False, **more).path.read_bytes()


def _drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_base_draws_what_is_missing(make_prior: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    """One picture a seed, those of the stock pipeline, whatever adapters the caller's model has."""
    folder = tmp_path / "class"
    _run(make_prior(seed=7, num_class_images=2), model)
    first = _drawn(folder)
    assert list(first) == ["class-00000.png", "class-00001.png"]
    settings = model.defaults.model_dump()
    for number, name in enumerate(first):
        (expected,) = model.family.generate(model.pipeline, [PROMPT], seeds=[7 + number], **settings)
        with Image.open(folder / name) as picture:
            assert picture.tobytes() == expected.tobytes()
            about = json.loads(picture.info["qrlora"])
        assert (about["prompt"], about["seed"], about["model"]) == (PROMPT, 7 + number, "tiny-flux")
        with pytest.raises(QrloraError, match=rf"is a class picture.* --prompt '{PROMPT}' --seed {7 + number} "):
            read_provenance(folder / name)
    add_adapter(model.denoiser, AdapterSpec(rank=2, init="normal", init_std=0.5), "mine")
    try:
        set_adapters(model.denoiser, {"mine": 1.0})
        (folder / "class-00001.png").unlink()
        Image.new("RGB", (50, 40), "red").save(folder / "mine.png")
        _run(make_prior(seed=7, num_class_images=4, output_dir=str(tmp_path / "more")), model)
    finally:
        remove_adapter(model.denoiser, "mine")
    more = _drawn(folder)
    assert list(more) == ["class-00000.png", "class-00001.png", "class-00002.png", "mine.png"]
    assert {name: more[name] for name in first} == first


def test_the_loss_is_the_instances_plus_the_weighted_classs(
    make_prior: MakeConfig, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Any, Any, float]] = []
    real = running.loss_of

    def spy(family: Any, denoiser: Any, encoded: Any, draw: Any, *rest: Any) -> torch.Tensor:
        loss = real(family, denoiser, encoded, draw, *rest)
        drawn.append((encoded, draw, float(loss.detach())))
        return loss

    monkeypatch.setattr(running, "loss_of", spy)
    config = make_prior(
        prior_loss_weight=0.3, gradient_accumulation_steps=2, max_train_steps=1, adapter={"basis": "lora"}
    )
    result = train(config, loaded=model, progress=False)
    assert [len(draw.rows) for _, draw, _ in drawn] == [2, 2, 2, 2]
    assert [encoded.counts for encoded, _, _ in drawn] == [(3,), (3,)] * 2
    (instance, a, first), (prior, b, second), (_, c, third), (_, d, fourth) = drawn
    assert result.losses[0] == pytest.approx(((first + 0.3 * second) + (third + 0.3 * fourth)) / 2, rel=1e-6)
    assert len({float(draw.noise.sum()) for draw in (a, b, c, d)}) == 4

    # each part against the formula, with latents of pictures read anew
    process = model.family.noise_process(model.pipeline)
    examples = {
        id(instance): load_examples(config.instance_data_dir or "", "a <c> dog", 32),
        id(prior): load_examples(tmp_path / "class", PROMPT, 32),
    }
    for encoded, draw, loss in drawn:
        pictures, errors = examples[id(encoded)], []
        for item in range(2):
            example = pictures[int(draw.rows[item])]
            clean = model.family.encode_pictures(model.pipeline, example.pixels[None]).double()
            sigma, noise = process.levels[draw.index[item]].double(), draw.noise[item][None].double()
            with torch.no_grad():
                velocity = model.family.predict(
                    model.denoiser,
                    ((1 - sigma) * clean + sigma * noise).float(),
                    sigma.float()[None],
                    model.family.encode_prompts(model.pipeline, [example.caption], 16),
                    1.0,
                ).double()
            error = (velocity - (noise - clean)) ** 2
            if example.mask is not None:
                weight = torch.nn.functional.adaptive_avg_pool2d(example.mask.double(), (4, 4))
                error = error * weight / weight.mean()
            errors.append(error.mean())
        assert loss == pytest.approx(float(sum(errors) / 2), rel=1e-5)


def test_the_weight_scales_the_gradient(make_prior: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    """Without weight the class changes nothing, and the sum of gradients is that of the sum of losses."""
    plain = make_prior(
        with_prior_preservation=False, class_data_dir=None, class_prompt=None, output_dir=str(tmp_path / "plain")
    )
    off = make_prior(prior_loss_weight=0, output_dir=str(tmp_path / "off"))
    on = make_prior(output_dir=str(tmp_path / "on"))
    results = [train(config, loaded=model, progress=False) for config in (plain, off, on)]
    assert results[0].losses == results[1].losses
    assert results[0].losses[0] < results[2].losses[0]


def test_resumed_is_uninterrupted(make_prior: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    options = {"aspect_ratio_buckets": "32,32;48,32", "random_flip": True, "center_crop": False, "random_crops": 2}
    whole = _run(make_prior(**options, output_dir=str(tmp_path / "whole")), model)

    def interrupt(done: int, _total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(running.Interrupted):
        _run(make_prior(**options), model, on_step=interrupt)
    for change, message in (
        ({"prior_loss_weight": 2}, "prior_loss_weight differs"),
        ({"class_prompt": "a dog", "class_data_dir": str(tmp_path / "other")}, "class_prompt differs"),
    ):
        with pytest.raises(QrloraError, match=f"cannot resume from .*: {message}"):
            _run(make_prior(**options, resume="latest", **change), model)
    one = tmp_path / "class" / "class-00001.png"
    kept = one.read_bytes()
    Image.new("RGB", (32, 32)).save(one)
    with pytest.raises(QrloraError, match=r"class_data_dir \(the class pictures\) differs from that run;"):
        _run(make_prior(**options, resume="latest"), model)
    one.unlink()  # drawn anew, from the same seed
    assert _run(make_prior(**options, resume="latest"), model) == whole
    assert one.read_bytes() == kept


def test_class_pictures_of_several_sizes_are_not_laid_together(
    make_prior: MakeConfig, model: LoadedModel, pictures: Path, tmp_path: Path
) -> None:
    """Where instance pictures are of one size, so that theirs could be."""
    (tmp_path / "class").mkdir()
    Image.new("RGB", (32, 48)).save(tmp_path / "class" / "tall.png")
    options = {"aspect_ratio_buckets": "32,32;48,32", "instance_data_dir": str(pictures / "a.png")}
    options |= {"instance_prompt": "a <c> dog", "max_train_steps": 2, "checkpointing_steps": 1}
    Image.new("RGB", (32, 32)).save(pictures / "a.png")
    _run(make_prior(**options, train_batch_size=1, gradient_accumulation_steps=2), model)
    (tmp_path / "out" / "adapter.safetensors").unlink()
    with pytest.raises(QrloraError, match="train_batch_size=2 would lay batches of 1 together"):
        _run(make_prior(**options, train_batch_size=2, resume=str(tmp_path / "out" / "checkpoint-2")), model)


CHILD = """
import os, signal, sys
from qrlora.training import TrainConfig, train
from qrlora.formats import _atomic

real, calls = os.replace, 0

def dying(source, target):
    global calls
    if "class-" in str(target):
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(source, target)

_atomic.os.replace = dying
train(TrainConfig.from_yaml(sys.argv[1]), progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_while_drawing(make_prior: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    """The third picture is written but not yet in place: two are kept, and drawing goes on with the third."""
    folder = tmp_path / "class"
    whole = _run(
        make_prior(num_class_images=4, class_data_dir=str(tmp_path / "c"), output_dir=str(tmp_path / "w")), model
    )
    given = make_prior(num_class_images=4).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "config.yaml")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == -9, child.stderr
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert names == ["class-00000.png", "class-00001.png"]
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
    before = [(folder / name).stat().st_mtime_ns for name in names]
    assert _run(make_prior(num_class_images=4), model) == whole
    assert [(folder / name).stat().st_mtime_ns for name in names] == before
    assert _drawn(folder) == _drawn(tmp_path / "c")


def test_progress(make_prior: MakeConfig, model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_prior(max_train_steps=1), loaded=model)
    assert "class pictures: 3/3" in capsys.readouterr().err
    train(make_prior(max_train_steps=1, overwrite=True), loaded=model)
    assert "class" not in capsys.readouterr().err


def test_only_as_many_as_were_asked_for(make_prior: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    _run(make_prior(num_class_images=4), model)
    fewer = _run(make_prior(num_class_images=2, output_dir=str(tmp_path / "a")), model)
    for name in ("class-00002.png", "class-00003.png"):
        (tmp_path / "class" / name).unlink()
    assert _run(make_prior(num_class_images=2, output_dir=str(tmp_path / "b")), model) == fewer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_data_dir": None}, "with_prior_preservation needs class_data_dir"),
        ({"class_prompt": " "}, "with_prior_preservation needs class_prompt"),
        ({"with_prior_preservation": False}, r"class_data_dir=.* is for with_prior_preservation: true"),
        ({"num_class_images": 0}, "num_class_images=0 is not valid"),
        ({"prior_loss_weight": -1}, "prior_loss_weight=-1 is not valid"),
    ],
)
def test_settings_that_do_not_go_together(make_prior: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QrloraError, match=message):
        make_prior(**changes)


def test_folders_that_cannot_be_class_pictures(
    make_prior: MakeConfig, model: LoadedModel, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(QrloraError, match="class_data_dir and instance_data_dir are one folder"):
        make_prior(class_data_dir=str(pictures / ".." / pictures.name))
    (tmp_path / "file").write_text("")
    with pytest.raises(QrloraError, match=r"class_data_dir: .*file is a file"):
        _run(make_prior(class_data_dir=str(tmp_path / "file")), model)
    _run(make_prior(), model)
    with pytest.raises(QrloraError, match=r"class-00000\.png was drawn for class_prompt='a photo of a dog', not for"):
        _run(make_prior(class_prompt="a photo of a cat", overwrite=True), model)
    (tmp_path / "class" / "class-00001.png").write_bytes(b"no picture")
    with pytest.raises(QrloraError, match=r"class-00001\.png is no readable picture"):
        _run(make_prior(overwrite=True), model)
    (tmp_path / "class" / "x.mask.jpg").write_bytes(b"")
    with pytest.raises(QrloraError, match=r"x\.mask\.jpg is named like a mask"):
        _run(make_prior(overwrite=True), model)
