"""Every form trains through the one loop, and a stopped run goes on to the same bits."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from qrlora.errors import QrloraError
from qrlora.formats import read_adapter
from qrlora.models import LoadedModel
from qrlora.training import Interrupted, TrainConfig, train
from tests.training.conftest import MakeConfig


def _run(config: TrainConfig, model: LoadedModel, **more: Any) -> bytes:
    return train(config, loaded=model, progress=False, **more).path.read_bytes()


@pytest.mark.parametrize(
    "adapter",
    [
        {"form": "both", "lora_alpha": 6.0},
        {"form": "core", "basis": "svd", "lora_alpha": 6.0},
        {"basis": "pissa"},
        {"basis": "dora", "lora_alpha": 6.0},
        {"band": "1/2", "rank": 2, "side": "input"},
    ],
    ids=lambda adapter: "-".join(map(str, adapter.values())),
)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    options = {"adapter": adapter, "max_train_steps": 4}
    whole = _run(make_config(**options, output_dir=str(tmp_path / "whole")), model)

    def interrupt(done: int, _total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        _run(make_config(**options), model, on_step=interrupt)
    assert _run(make_config(**options, resume="latest"), model) == whole
    both = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "out")]
    assert both[0] == both[1]
    assert both[0]["loss"][0] != both[0]["loss"][-1]


def test_a_run_may_start_from_a_file_of_its_form(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    first = train(make_config(adapter={"form": "both"}), loaded=model, progress=False)
    adapter = read_adapter(first.path)
    assert first.parameters == sum(4 * (pair.B.shape[0] + pair.A.shape[1]) for pair in adapter.layers.values())
    more = make_config(adapter={"form": "both"}, init_from=str(first.path), output_dir=str(tmp_path / "more"))
    assert train(more, loaded=model, progress=False).losses
    other = make_config(adapter={"form": "core"}, init_from=str(first.path), output_dir=str(tmp_path / "other"))
    with pytest.raises(QrloraError, match="is a both adapter, but form 'core' is asked for"):
        train(other, loaded=model, progress=False)


def test_a_checkpoint_from_before_forms_is_resumed(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    """Its record has no entries for what did not exist."""
    whole = _run(make_config(max_train_steps=4), model)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    index = json.loads((checkpoint / "state.json").read_text())
    for name in ("form", "band"):
        del index["record"][f"adapter.{name}"]
    (checkpoint / "state.json").write_text(json.dumps(index))
    resumed = make_config(max_train_steps=4, resume=str(checkpoint), output_dir=str(tmp_path / "other"))
    assert read_adapter(tmp_path / "out" / "adapter.safetensors").layers.keys()
    assert len(_run(resumed, model)) == len(whole)
