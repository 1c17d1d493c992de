"""Exit codes, messages, and a quick start."""

import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from qrlora import cli
from qrlora.cli._main import VERBS
from qrlora.errors import QrloraWarning
from qrlora.training import Interrupted
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("blnd", "unknown verb 'blnd'; did you mean blend?"),
        ("qqqq", "there are blend, train"),
        ("blend --contnt x", "unknown option --contnt; did you mean --content?"),
        ("blend --rank 0", "--rank 0 is not valid"),
        ("blend --rank four", "--rank four is not valid"),
        ("blend --content dog.png --content-prompt x --style ink.png --style-prompt y", "Give --prompt"),
        ("merge a.safetensors", "--output is missing"),
        ("merge a.safetensors --output b.safetensors", "a.safetensors"),
        ("merge a.safetensors --output dog.png", "--output dog.png exists"),
        ("merge dog.png --output m.safetensors", "dog.png"),
        ("merge a.safetensors --output m.pt", "must end in .safetensors"),
        ("merge a --output b.safetensors --save-dtype fp64", "fp64"),
        ("merge a --output b.safetensors --option path=c", "--option path: no merge method has that option"),
        ("analyze a.safetensors", "--output is missing"),
        ("analyze a.safetensors --output r", "a.safetensors"),
        ("analyze a.safetensors --output dog.png", "--output dog.png exists"),
        ("analyze a.safetensors --output r --draws 1", "--draws 1 is not valid"),
        ("analyze a.safetensors --output r --usage dog.png", "a.safetensors"),
        ("generate --prompt x --output x.jpg", "must end in .png"),
        ("generate", "--prompt"),
        ("generate --prompt x --adapter a=b --output x.png", "'b' is not a weight"),
        ("generate --prompt x --model nowhere/a/b --output x.png", "nowhere/a/b"),
        ("generate --prompt x --height 33 --output x.png", "height=33"),
        ("generate --prompt x --device marble --output x.png", "--device marble"),
        ("generate --from dog.png --output x.png", "not made by qrlora"),
        ("generate --from dog.png --output x.png --seed 3", "drop --seed"),
        ("generate --from dog.png --output x.png --seed 0", "drop --seed"),
        ("generate --from dog.png --output x.png --guidance-scale 0", "drop --guidance-scale"),
        ("generate --from dog.png --output x.png --negative-prompt=", "drop --negative-prompt"),
        ("inspect nowhere.safetensors", "nowhere.safetensors"),
        ("inspect nowhere.png", "nowhere.png"),
        ("basis --rank 9999", "9999"),
        ("basis --basis qqq", "'qqq'"),
        ("basis --basis lora", "--basis lora has no basis"),
        (
            "generate --prompt x --max-sequence-length 600 --output x.png",
            "--max-sequence-length 600 is not possible for flux",
        ),
        ("generate --prompt x --guidance-scale nan --output x.png", "--guidance-scale nan is not valid"),
        ("blend --true-cfg-scale inf", "--true-cfg-scale inf is not valid"),
        ("config", "config init"),
        ("config check nowhere.yaml", "nowhere.yaml"),
        ("train nowhere.yaml", "nowhere.yaml"),
        ("train a.yaml b.yaml", "b.yaml is a second one"),
        ("train --seed 1 --seed 2", "--seed is given twice"),
        ("train --instance_data_dir dog.png --output_dir o --max_train_stps 3", "did you mean max_train_steps?"),
        ("train --instance_data_dir dog.png --output_dir o --instance_prompt <c> --adapter.rnk 3", "adapter.rank"),
        ("train --instance_data_dir dog.png --output_dir o", "dog.png has no caption"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    line: str, words: str, run: Run, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()}
    assert run(line) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("qrlora: ")
    assert words in said.err
    assert said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in desk.rglob("*") if path.is_file()} == before


def test_help_of_everything(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    usage = capsys.readouterr().out
    assert all(verb in usage for verb in VERBS)
    for verb in ("train", "config"):
        assert run(f"{verb} --help") == 0
    assert "--adapter.rank" in capsys.readouterr().out
    for verb in ("blend", "merge", "analyze", "generate", "inspect", "basis"):
        with pytest.raises(SystemExit) as stop:
            run(f"{verb} --help")
        assert stop.value.code == 0
        assert f"usage: qrlora {verb}" in capsys.readouterr().out


def test_no_verb_shows_the_usage(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("") == 2
    assert "usage: qrlora" in capsys.readouterr().out
    assert run("--version") == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (Interrupted(3, Path("c"), 15), 143), (Interrupted(3, Path(), 2), 130)],
)
def test_interruptions(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(import_module("qrlora.cli.merge"), "run", stop)
    assert cli.main(["merge"]) == code
    assert "stopped" in capsys.readouterr().err


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("qrlora.cli.merge"), "run", lambda _arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["merge"])


def test_our_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(_arguments: list[str]) -> None:
        warnings.simplefilter("always")
        warnings.warn("the rank grew.", QrloraWarning, stacklevel=1)

    monkeypatch.setattr(import_module("qrlora.cli.merge"), "run", warn)
    assert cli.main(["merge"]) == 0
    assert capsys.readouterr().err == "qrlora: note: the rank grew.\n"


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from qrlora.cli import main; main(['--help']); main(['blnd']); main(['blend', '--contnt', 'x']);"
        "print('LOADED', sorted(sys.modules.keys() & {'torch', 'diffusers', 'transformers', 'peft'}))"
    )
    source = str(Path(cli.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": source},
    )
    assert "LOADED []" in done.stdout


def test_module_runs_and_leaves_libraries_quiet(desk: Path, tiny_flux: Path) -> None:
    source = str(Path(cli.__file__).parents[2])
    line = [sys.executable, "-m", "qrlora", "generate", "--model", str(tiny_flux), "--prompt", "a dog"]
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_VERBOSITY")}
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment | {"PYTHONPATH": source})
    assert done.stdout == "picture.png\n"
    assert done.stderr == ""


def test_torchvision_is_not_advised_at_any_verbosity(desk: Path, tiny_flux: Path) -> None:
    """And transformers' other warnings go on as the user's own setting wants them."""
    code = (
        "import sys, logging; from qrlora.cli import main;"
        "code = main(['generate', '--model', sys.argv[1], '--prompt', 'a dog']);"
        "from transformers.utils import import_utils; import_utils.logger.warning('another one'); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_flux)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "TRANSFORMERS_VERBOSITY": "warning"},
    )
    assert "torchvision" not in done.stderr
    assert "another one" in done.stderr
