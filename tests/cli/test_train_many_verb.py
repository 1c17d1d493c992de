"""`qrlora train-many` from its list to its contact sheet."""

import json
import signal
from pathlib import Path

import pytest
import yaml
from PIL import Image

from qrlora.blend import read_provenance
from qrlora.cli import main
from qrlora.formats import read_adapter
from qrlora.training import run as training_run
from tests.cli.conftest import Run

ROOT = Path(__file__).parent.parent.parent


def test_a_list_from_end_to_end(run: Run, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [
        {"name": "dog", "instance_data_dir": "dog.png", "instance_prompt": "a <c> dog"},
        {"name": "ink", "instance_data_dir": "ink.png", "instance_prompt": "a cat", "learning_rate": 3e38},
    ]
    listed = {"output_dir": "all", "max_train_steps": 2, "max_grad_norm": float("inf"), "jobs": jobs}
    Path("jobs.yaml").write_text(yaml.safe_dump(listed))
    assert run("train-many jobs.yaml") == 1
    said = capsys.readouterr()
    assert said.out.split() == ["all/contact.png"]
    assert "job 2 of 2: ink" in said.err
    assert "1 of 2 jobs failed (ink); all/summary.json says why" in said.err
    lines = [line.split() for line in said.err.splitlines()]
    assert ["dog", "trained", "2"] in [line[:3] for line in lines]
    assert ["ink", "failed", "0"] in [line[:3] for line in lines]
    drawn = read_provenance(desk / "all" / "pictures" / "dog.png")
    assert (drawn.prompt, [use.file for use in drawn.adapters]) == ("a <c> dog", ["../dog/adapter.safetensors"])
    assert not (desk / "all" / "pictures" / "ink.png").exists()

    assert run("train-many jobs.yaml --jobs.learning_rate 1") == 2
    capsys.readouterr()
    jobs[1]["learning_rate"] = 1e-3
    Path("jobs.yaml").write_text(yaml.safe_dump(listed))
    assert run("train-many jobs.yaml") == 0
    assert "was done" in capsys.readouterr().err
    (desk / "all" / "contact.png").write_bytes((desk / "dog.png").read_bytes())
    assert run("train-many jobs.yaml") == 2
    assert "contact.png was not made by qrlora and stays" in capsys.readouterr().err


def test_an_adapter_is_drawn_at_the_timesteps_it_was_trained_at(run: Run, desk: Path) -> None:
    jobs = [{"name": "dog", "instance_data_dir": "dog.png", "instance_prompt": "a dog", "min_timestep": 500}]
    Path("jobs.yaml").write_text(yaml.safe_dump({"output_dir": "all", "max_train_steps": 1, "jobs": jobs}))
    assert run("train-many jobs.yaml") == 0
    (use,) = read_provenance(desk / "all" / "pictures" / "dog.png").adapters
    assert use.timesteps == (500, 1000)
    assert run("generate --from all/pictures/dog.png --output again.png") == 0
    with Image.open("again.png") as again, Image.open("all/pictures/dog.png") as first:
        assert again.tobytes() == first.tobytes()


def test_a_stopped_list_says_how_to_go_on(
    run: Run, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [{"name": "dog", "instance_data_dir": "dog.png", "instance_prompt": "a dog"}]
    Path("jobs.yaml").write_text(yaml.safe_dump({"output_dir": "all", "max_train_steps": 3, "jobs": jobs}))
    train_step = training_run.Run.train_step

    def stopped(self: training_run.Run) -> None:
        train_step(self)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(training_run.Run, "train_step", stopped)
        assert run("train-many jobs.yaml") == 130
    folder = Path("all") / "dog" / "checkpoint-1"
    assert f"stopped at step 1; saved in {folder}; the same command goes on from there." in capsys.readouterr().err
    assert run("train-many jobs.yaml") == 0
    assert json.loads(Path("all/summary.json").read_text())["results"][0]["steps"] == 3


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the embedded base itself."""
    monkeypatch.chdir(ROOT)
    options = ["--output_dir", str(tmp_path / "jobs"), "--max_train_steps", "1", "--train_batch_size", "1"]
    assert main(["train-many", "examples/train-many.yaml", *options]) == 0
    capsys.readouterr()
    for name in ("dragon", "apple"):
        assert len(read_adapter(tmp_path / "jobs" / name / "adapter.safetensors").layers) == 36
    summary = json.loads((tmp_path / "jobs" / "summary.json").read_text())
    assert [result["status"] for result in summary["results"]] == ["trained", "trained"]
    with Image.open(tmp_path / "jobs" / "contact.png") as sheet:
        assert min(sheet.size) > 200


def test_what_is_missing_is_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train-many") == 2
    assert "name the list of trainings" in capsys.readouterr().err
    assert run("train-many none.yaml") == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err
    assert run("train-many --help") == 0
    assert "JOBS.yaml has the keys" in capsys.readouterr().out
