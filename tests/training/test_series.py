"""A series of trainings: each is the one it would be alone, and what is wrong with one is said before any begins."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from qrlora.errors import QrloraError
from qrlora.models import LoadedModel
from qrlora.training import (
    Interrupted,
    JobsFailed,
    Series,
    TrainConfig,
    TrainResult,
    check_on_model,
    check_summary,
    load_for_series,
    read_series,
    train,
    train_many,
    train_series,
)
from qrlora.training.run import Run


@pytest.fixture
def listed(tmp_path: Path, pictures: Path, tiny_flux: Path) -> Path:
    """A list of three jobs, the second of which diverges."""
    jobs = [
        {"name": "dog", "instance_prompt": "a <c> dog"},
        {"name": "fast", "instance_prompt": "a cat", "learning_rate": 3e38, "max_grad_norm": float("inf")},
        {"name": "cat", "instance_prompt": "a cat", "seed": 1, "adapter.rank": 3},
    ]
    return write(tmp_path, pictures, tiny_flux, jobs)


def write(tmp_path: Path, pictures: Path, model: Path, jobs: Any, **shared: Any) -> Path:
    given = {
        "model": str(model),
        "instance_data_dir": str(pictures),
        "output_dir": str(tmp_path / "all"),
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "adapter": {"rank": 2},
    }
    path = tmp_path / "jobs.yaml"
    path.write_text(yaml.safe_dump({**given, **shared, "jobs": jobs}))
    return path


def alone(series: Series, number: int, folder: Path, model: LoadedModel) -> bytes:
    given = series.jobs[number].config.model_dump(exclude_unset=True)
    config = TrainConfig.parse({**given, "output_dir": str(folder), "resume": None})
    return train(config, loaded=model, progress=False).path.read_bytes()


def test_each_job_is_the_training_it_would_be_alone(listed: Path, model: LoadedModel, tmp_path: Path) -> None:
    series = read_series(listed)
    own = load_for_series(series)
    check_on_model(series, own)
    begun: list[tuple[int, str]] = []
    results = train_series(series, own, progress=False, on_job=lambda number, job: begun.append((number, job.name)))
    assert begun == [(1, "dog"), (2, "fast"), (3, "cat")]
    assert [(each.name, each.status, each.steps) for each in results] == [
        ("dog", "trained", 4),
        ("fast", "failed", 0),
        ("cat", "trained", 4),
    ]
    assert "not finite" in (results[1].error or "")
    for number, name in ((0, "dog"), (2, "cat")):
        made = tmp_path / "all" / name / "adapter.safetensors"
        assert made.read_bytes() == alone(series, number, tmp_path / f"alone {name}", model)
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert [each["status"] for each in summary["results"]] == ["trained", "failed", "trained"]
    check_summary(tmp_path / "all")
    error = JobsFailed(results, tmp_path / "all" / "summary.json")
    assert (error.exit_code, "1 of 3 jobs failed (fast)" in str(error)) == (1, True)

    # Again: what is done stays as it is.
    before = (tmp_path / "all" / "cat" / "adapter.safetensors").stat().st_mtime_ns
    with pytest.raises(QrloraError, match=r"job dog: cannot resume from .*: adam_beta1 differs"):
        check_on_model(read_series(listed, {"adam_beta1": 0.5}), own)
    text = yaml.safe_load(listed.read_text())
    text["jobs"][1] |= {"learning_rate": 1e-3, "max_grad_norm": 1.0}
    listed.write_text(yaml.safe_dump(text))
    again = read_series(listed)
    check_on_model(again, own)
    assert [each.status for each in train_series(again, own, progress=False)] == ["was done", "trained", "was done"]
    assert (tmp_path / "all" / "cat" / "adapter.safetensors").stat().st_mtime_ns == before


def test_a_stopped_series_goes_on_exactly(
    listed: Path, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = Run.train_step

    def stopped(self: Run) -> None:
        train_step(self)
        if self.step == 3 and self.config.output_dir.endswith("cat"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "train_step", stopped)
    with pytest.raises(Interrupted):
        train_series(read_series(listed), model, progress=False)
    monkeypatch.setattr(Run, "train_step", train_step)
    series = read_series(listed)
    assert [job.config.resume for job in series.jobs] == ["latest", None, "latest"]
    results = train_series(series, model, progress=False)
    assert [each.status for each in results] == ["was done", "failed", "trained"]
    made = tmp_path / "all" / "cat" / "adapter.safetensors"
    assert made.read_bytes() == alone(series, 2, tmp_path / "alone", model)


@pytest.mark.parametrize(
    ("job", "shared", "told"),
    [
        ({"max_train_step": 3}, {}, "job two: unknown key max_train_step; did you mean max_train_steps?"),
        ({"seed": -1}, {}, "job two: seed=-1 is not valid"),
        ({"adapter": {"rank": 0}}, {}, "job two: adapter.rank=0 is not valid"),
        ({"instance_data_dir": "nowhere"}, {}, "job two: instance_data_dir: there is no picture or folder nowhere"),
        ({"init_from": "nowhere.safetensors"}, {}, "job two: .*nowhere.safetensors"),
        ({"model": "other"}, {}, "job two: model cannot be set here: all jobs share one model"),
        ({"mixed_precision": "bf16"}, {}, "job two: mixed_precision cannot be set here"),
        ({"output_dir": "x"}, {}, "job two: output_dir cannot be set here"),
        ({"resume": "latest"}, {}, "job two: resume cannot be set here: a job goes on by itself"),
        ({}, {"overwrite": True}, "overwrite cannot be set here: remove a job's folder"),
        ({}, {"hub_model_id": "me/it"}, "hub_model_id would be one repository for all jobs"),
        ({}, {"max_train_stebs": 3}, "job one: unknown key max_train_stebs"),
        ({"name": "ONE"}, {}, "job ONE would write where job one is written"),
        ({"name": "pictures"}, {}, "job pictures would write where what all jobs make together is written"),
        ({"name": "../two"}, {}, r"jobs\.1\.name \(job number 2\) is not valid"),
    ],
)
def test_what_is_wrong_is_told_with_the_job(
    job: dict[str, Any], shared: dict[str, Any], told: str, tmp_path: Path, pictures: Path, tiny_flux: Path
) -> None:
    jobs = [{"name": "one", "instance_prompt": "a dog"}, {"name": "two", "instance_prompt": "a cat", **job}]
    with pytest.raises(QrloraError, match=told):
        read_series(write(tmp_path, pictures, tiny_flux, jobs, **shared))
    assert not (tmp_path / "all").exists()


def test_pictures_are_read_before_anything_is_trained(tmp_path: Path, pictures: Path, tiny_flux: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "a.png").read_bytes()[:100])
    jobs = [{"name": "one", "instance_prompt": "a dog"}, {"name": "two", "instance_prompt": "a cat"}]
    jobs[1]["instance_data_dir"] = str(broken)
    with pytest.raises(QrloraError, match=r"job two: .*broken\.png"):
        read_series(write(tmp_path, pictures, tiny_flux, jobs))


def test_what_only_the_model_can_tell(tmp_path: Path, pictures: Path, tiny_flux: Path, model: LoadedModel) -> None:
    jobs = [{"name": "one", "instance_prompt": "a dog"}, {"name": "two", "instance_prompt": "a cat", "resolution": 33}]
    with pytest.raises(QrloraError, match="job two: resolution=33 must be a multiple of 16"):
        check_on_model(read_series(write(tmp_path, pictures, tiny_flux, jobs)), model)
    jobs[1] = {"name": "two", "instance_prompt": "a cat", "adapter": {"rank": 1000}}
    with pytest.raises(QrloraError, match=r"job two: .* allows a rank of at most"):
        check_on_model(read_series(write(tmp_path, pictures, tiny_flux, jobs)), model)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- name: one", "must be a mapping of settings"),
        ("output_dir: x\njobs: []", "jobs is not valid"),
        ("jobs: [{name: one}]", "output_dir is not valid"),
        ("jobs: [", "are not YAML"),
    ],
)
def test_files_that_are_no_list(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(text)
    with pytest.raises(QrloraError, match=told):
        read_series(tmp_path / "jobs.yaml")
    with pytest.raises(QrloraError, match="cannot be read"):
        read_series(tmp_path / "none.yaml")


def test_a_summary_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(QrloraError, match="was not written by qrlora train-many and stays"):
        check_summary(tmp_path)
    with pytest.raises(QrloraError, match=r"summary\.json is a file; name a folder"):
        check_summary(tmp_path / "summary.json")


@pytest.mark.parametrize("kind", [KeyError, TypeError, RuntimeError, OSError])
def test_a_bug_in_one_job_leaves_the_others(
    kind: type[Exception],
    listed: Path,
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained: list[str] = []

    def one(config: TrainConfig, **_: Any) -> TrainResult:
        trained.append(Path(config.output_dir).name)
        if trained[-1] == "dog":
            raise kind("broken")
        return TrainResult(Path("there"), [1.0], 0.1, {"train": 0.1}, 1, config)

    monkeypatch.setattr(train_many, "train", one)
    results = train_series(read_series(listed), model, progress=False)
    assert trained == ["dog", "fast", "cat"]
    assert [each.status for each in results] == ["failed", "trained", "trained"]
    assert (results[0].error or "").startswith(f"{kind.__name__}: ")
    assert "Traceback" in capsys.readouterr().err
