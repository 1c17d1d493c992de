"""`qrlora estimate`."""

import json
from pathlib import Path

import pytest

from qrlora.cli import main
from qrlora.models import shipped_models

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_table_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--train_batch_size", "8", "--quantization", "nf4", "--offload", "blocks"]) == 0
    text = capsys.readouterr().out
    assert "36 layers adapted" in text
    assert "an estimate" in text
    assert "nothing was measured" in text
    for part in ("text encoders", "rooms for streamed blocks", "coefficients", "optimiser states", "activations kept"):
        assert part in text
    assert "--card GIB says whether that fits a card." in text or "fits a card of" in text
    assert main(["estimate", "--card", "0.62", "--train_batch_size", "64"]) == 0
    assert "does not fit a card of 0.62 GiB" in capsys.readouterr().out
    assert main(["estimate", "--memory", "6gb"]) == 0
    assert "fits a card of 6 GiB" in capsys.readouterr().out


def test_json_of_a_configuration_file(tmp_path: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model: {tiny_flux}\ninstance_data_dir: nowhere\noutput_dir: out\nadapter:\n  rank: 8\ndevice: cpu\n"
    )
    assert main(["estimate", str(file), "--json", "--rank", "2", "--use_ema"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "tiny-flux"
    assert found["settings"]["adapter.rank"] == 2
    assert found["context"] == 0
    assert found["fits"] is None
    training = found["phases"]["training"]
    assert training.pop("total") == sum(training.values()) == found["peak"]
    # [2, in] in fp32, its two moments and its average
    assert training["optimiser states"] == 3 * training["coefficients"]


def test_what_cannot_be_estimated_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["--card", "big"], "--card big is not valid"),
        (["--model", "nowhere/at/all"], "Known without files are flux-dev"),
        (["--memori", "6gb"], "unknown key memori; did you mean memory?"),
        (["--memory", "7gb"], "memory='7gb' is not valid"),
        (["--adapter.experts", "4"], "a gated adapter needs is not known before"),
    ):
        assert main(["estimate", *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


def test_help_names_the_models_that_need_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--help"]) == 0
    out = capsys.readouterr().out
    for model in shipped_models():
        assert model in out
