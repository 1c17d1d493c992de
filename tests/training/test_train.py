"""The loop, end to end on a tiny FLUX."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qrlora.adapter import AdapterSpec, add_adapter, attach_adapter, remove_adapter, set_adapters
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter
from qrlora.models import LoadedModel
from qrlora.training import Interrupted, TrainConfig, split, train
from qrlora.training import run as running
from tests.training.conftest import MakeConfig


def _run(config: TrainConfig, model: LoadedModel, **more: Any) -> bytes:
    return train(config, loaded=model, progress=False, **more).path.read_bytes()


def _output(model: LoadedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        conditioning = model.family.encode_prompts(model.pipeline, ["a <c> dog"], 16)
        return model.family.predict(
            model.denoiser, torch.randn(1, 4, 4, 4, generator=generator), torch.tensor([0.5]), conditioning, 1.0
        )


def test_a_run_leaves_its_result_and_the_model_as_it_was(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    before = _output(model)
    steps: list[tuple[int, int]] = []
    result = train(
        make_config(max_train_steps=30),
        loaded=model,
        progress=False,
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert torch.equal(_output(model), before)
    assert steps == [(step, 30) for step in range(1, 31)]
    assert result.path == tmp_path / "out" / "adapter.safetensors"
    assert len(result.losses) == 30
    assert json.loads((tmp_path / "out" / "losses.json").read_text())["loss"] == result.losses
    again = TrainConfig.from_yaml(tmp_path / "out" / "config.yaml")
    assert (again.resolution, again.adapter.rank, again.mixed_precision) == (32, 4, "no")
    adapter = read_adapter(result.path)
    assert adapter.header is not None
    assert adapter.header.base_model == "tiny-flux"
    assert adapter.header.trigger_words == ["<c>"]
    assert adapter.header.training is not None
    assert adapter.header.training["record"]["max_train_steps"] == 30
    assert result.parameters == sum(4 * pair.A.shape[1] - 6 for pair in adapter.layers.values())
    assert sum(int(pair.A.count_nonzero()) for pair in adapter.layers.values()) <= result.parameters
    attach_adapter(model.denoiser, adapter, "result")
    assert not torch.allclose(_output(model), before)
    remove_adapter(model.denoiser, "result")


def test_training_lowers_the_loss_on_what_it_has_seen(make_config: MakeConfig, model: LoadedModel) -> None:
    config = make_config(max_train_steps=60, train_batch_size=8, learning_rate=3e-2, checkpointing_steps=1000)
    losses = train(config, loaded=model, progress=False).losses
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_the_first_loss_is_the_base_models(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    """At the start an adapter changes nothing, so every kind of adapter begins with the same loss."""
    first = {
        basis: train(
            make_config(max_train_steps=1, output_dir=str(tmp_path / basis), adapter={"basis": basis}),
            loaded=model,
            progress=False,
        ).losses[0]
        for basis in ("qr", "random", "lora")
    }
    assert len(set(first.values())) == 1


def test_accumulation_is_a_larger_batch(make_config: MakeConfig, model: LoadedModel, pictures: Path) -> None:
    """With one draw for everything (patched), 2 x 3 items and 6 items give the same gradient."""
    drawn: list[tuple[int, int]] = []
    real = split.draw

    def spy(config: TrainConfig, encoded: Any, table: Any, step: int, micro: int, **named: Any) -> Any:
        drawn.append((step, micro))
        return real(config, encoded, table, step, micro, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "draw", spy)
        train(make_config(max_train_steps=2, gradient_accumulation_steps=3), loaded=model, progress=False)
    assert drawn == [(step, micro) for step in range(2) for micro in range(3)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter": {"basis": "lora"}, "lr_scheduler": "cosine", "random_flip": True},
        {
            "adapter": {"lora_alpha": 2.0, "init": "normal"},
            "gradient_accumulation_steps": 2,
            "weighting_scheme": "mode",
        },
    ],
    ids=["qr", "lora", "scaled"],
)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    whole = _run(make_config(**options, output_dir=str(tmp_path / "whole")), model)

    def interrupt(done: int, _total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        _run(make_config(**options), model, on_step=interrupt)
    assert (caught.value.step, caught.value.exit_code) == (3, 130)
    assert caught.value.checkpoint == tmp_path / "out" / "checkpoint-3"
    assert not (tmp_path / "out" / "adapter.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert _run(make_config(**options, resume="latest"), model) == whole
    both = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "out")]
    assert both[0] == both[1]


def test_resuming_from_a_named_checkpoint_into_another_folder(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    whole = _run(make_config(), model)
    resumed = make_config(resume=str(tmp_path / "out" / "checkpoint-2"), output_dir=str(tmp_path / "other"))
    assert _run(resumed, model) == whole


def test_a_checkpoint_holds_a_loadable_adapter(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    _run(make_config(), model)
    at_the_end = read_adapter(tmp_path / "out" / "checkpoint-6" / "adapter.safetensors")
    result = read_adapter(tmp_path / "out" / "adapter.safetensors")
    for name, pair in result.layers.items():
        assert torch.equal(pair.A, at_the_end.layers[name].A)


def test_checkpoints_are_pruned(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    _run(make_config(checkpoints_total_limit=1), model)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"adapter": {"rank": 2}}, r"adapter\.rank"),
        ({"adapter": {"basis": "svd"}}, r"adapter\.basis"),
        ({"seed": 1}, "seed"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"instance_prompt": "another dog"}, r"instance_data_dir \(the pictures, masks or captions\)"),
        ({"mask_loss": False}, "mask_loss"),
        ({"lr_scheduler": "linear"}, "lr_scheduler"),
    ],
)
def test_resuming_another_run_names_the_key(
    make_config: MakeConfig, model: LoadedModel, change: dict[str, Any], key: str
) -> None:
    _run(make_config(max_train_steps=2), model)
    with pytest.raises(QrloraError, match=rf"cannot resume from .*checkpoint-2: ({key}) differs"):
        _run(make_config(max_train_steps=4, resume="latest", **change), model)


def test_more_steps_continue_a_run_of_constant_rate(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    whole = _run(make_config(output_dir=str(tmp_path / "whole")), model)
    _run(make_config(max_train_steps=4), model)
    longer = _run(make_config(resume="latest"), model)
    assert longer == whole
    with pytest.raises(QrloraError, match="already took 6 steps"):
        _run(make_config(max_train_steps=4, resume="latest"), model)


def test_a_finished_run_resumes_to_itself(make_config: MakeConfig, model: LoadedModel) -> None:
    first = train(make_config(), loaded=model, progress=False)
    time_of_result = first.path.stat().st_mtime_ns
    again = train(make_config(resume="latest"), loaded=model, progress=False)
    assert again.path.stat().st_mtime_ns == time_of_result
    assert again.losses == first.losses


def test_nothing_is_written_over(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    _run(make_config(max_train_steps=2), model)
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(QrloraError, match=r"holds a finished result; name another output_dir, or set overwrite: true"):
        _run(make_config(seed=1), model)
    (tmp_path / "out" / "adapter.safetensors").rename(tmp_path / "away")
    with pytest.raises(QrloraError, match=r"checkpoints of an unfinished run; continue it with resume: latest"):
        _run(make_config(seed=1), model)
    (tmp_path / "away").rename(tmp_path / "out" / "adapter.safetensors")
    for bad in ({"instance_data_dir": str(tmp_path / "none")}, {"resolution": 40}, {"adapter": {"basis": "qrr"}}):
        with pytest.raises(QrloraError):
            _run(make_config(overwrite=True, **bad), model)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == kept

    def unchanged(done: int, _total: int) -> None:
        """Until something newer is there."""
        assert all(path.exists() == (done < 5) for path in kept if path.parent.name == "checkpoint-2"), done

    _run(make_config(seed=1, overwrite=True, checkpointing_steps=5), model, on_step=unchanged)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-5"]


def test_a_loss_that_is_not_finite_stops_the_run(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running.loss_of

    def failing(*given: Any) -> torch.Tensor:
        loss = real(*given)
        calls.append(1)
        return loss * float("nan") if len(calls) == 5 else loss

    calls: list[int] = []
    monkeypatch.setattr(running, "loss_of", failing)
    with pytest.raises(QrloraError, match=r"not finite at step 4, .*checkpoint-4\. Try a lower learning_rate"):
        _run(make_config(), model)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "adapter.safetensors").exists()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_starting_from_an_adapter(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    first = train(make_config(), loaded=model, progress=False)
    start = read_adapter(first.path)
    config = make_config(
        init_from=str(first.path), output_dir=str(tmp_path / "second"), learning_rate=1e-12, max_train_steps=1, seed=9
    )
    second = read_adapter(train(config, loaded=model, progress=False).path)
    for name, pair in start.layers.items():
        assert torch.equal(pair.B, second.layers[name].B)
        torch.testing.assert_close(pair.A, second.layers[name].A, rtol=0, atol=1e-9)
    for change, key in (({"rank": 2}, "rank"), ({"mask": "full"}, "mask")):
        with pytest.raises(QrloraError, match=rf"init_from: .* adapter\.{key}"):
            _run(make_config(init_from=str(first.path), output_dir=str(tmp_path / "no"), adapter=change), model)


def test_an_adapter_of_the_caller_is_not_in_the_way(make_config: MakeConfig, model: LoadedModel) -> None:
    expected = _run(make_config(), model)
    add_adapter(model.denoiser, AdapterSpec(rank=2, init="normal", init_std=0.5), "mine")
    try:
        set_adapters(model.denoiser, {"mine": 1.0})
        before = _output(model)
        assert _run(make_config(overwrite=True), model) == expected
        assert torch.equal(_output(model), before)
    finally:
        remove_adapter(model.denoiser, "mine")


def test_gradient_checkpointing_changes_no_bit(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    plain = _run(make_config(), model)
    assert _run(make_config(gradient_checkpointing=True, output_dir=str(tmp_path / "less")), model) == plain
    assert not model.denoiser.is_gradient_checkpointing


def test_bf16_trains_fp32_coefficients(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(mixed_precision="bf16", validation_prompt="a <c> cat", validation_steps=3)
    result = train(config, progress=False)
    adapter = read_adapter(result.path)
    pair = next(iter(adapter.layers.values()))
    assert not torch.equal(pair.A, pair.A.bfloat16().float())
    assert adapter.header is not None
    assert all(value.startswith("bfloat16:") for value in adapter.header.weight_hashes.values())


def test_validation_pictures_do_not_change_the_result(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    plain = _run(make_config(), model)
    config = make_config(
        output_dir=str(tmp_path / "seen"), validation_prompt="a <c> cat", validation_steps=4, num_validation_images=2
    )
    assert _run(config, model) == plain
    pictures = sorted((tmp_path / "seen" / "validation").iterdir())
    assert [path.name for path in pictures] == [f"step-{s:06d}-{i}.png" for s in (4, 6) for i in (0, 1)]
    with Image.open(pictures[1]) as picture:
        assert picture.size == (32, 32)
        assert set(picture.info) == {"qrlora"}
        about = json.loads(picture.info["qrlora"])
    assert (about["prompt"], about["seed"], about["step"]) == ("a <c> cat", 1, 4)
    assert (about["model"], about["settings"]["height"]) == ("tiny-flux", 32)


def test_tensorboard(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    _run(make_config(report_to="tensorboard"), model)
    assert list((tmp_path / "out" / "logs").rglob("events.out.tfevents.*"))
    with pytest.raises(QrloraError, match="report_to=tensorbored is not a tracker"):
        _run(make_config(report_to="tensorbored", output_dir=str(tmp_path / "no")), model)


def test_progress_off_a_terminal_is_a_line(
    make_config: MakeConfig, model: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(max_train_steps=2), loaded=model)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("train: 2/2 loss ")
    assert "\r" not in captured.err


def test_a_missing_initial_adapter_is_one_sentence(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match=r"none\.safetensors"):
        _run(make_config(init_from=str(tmp_path / "none.safetensors")), model)
    assert not (tmp_path / "out").exists()
