"""Ranges of timesteps on the command line."""

from pathlib import Path

import pytest
from PIL import Image, ImageChops

from qrlora.blend import read_provenance
from qrlora.cli.generate import split_adapter
from qrlora.errors import QrloraError
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dog.safetensors", ("dog.safetensors", 1.0, None)),
        ("dog.safetensors=0.9", ("dog.safetensors", 0.9, None)),
        ("dog.safetensors=-0.5@500-1000", ("dog.safetensors", -0.5, (500.0, 1000.0))),
        ("a=b/dog.safetensors@0-12.5", ("a=b/dog.safetensors", 1.0, (0.0, 12.5))),
        ("me@home/dog.safetensors=0.9", ("me@home/dog.safetensors", 0.9, None)),
        ("me@home/dog.safetensors", ("me@home/dog.safetensors", 1.0, None)),
        ("me@home/dog.safetensors=2@1-2", ("me@home/dog.safetensors", 2.0, (1.0, 2.0))),
        ("x=1@5-6", ("x=1@5-6", 1.0, None)),  # there is a file of that name
        ("y@5-6", ("y", 1.0, (5.0, 6.0))),
    ],
)
def test_what_an_adapter_option_says(
    text: str, expected: tuple[str, float, tuple[float, float] | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x=1@5-6", "a=b/dog.safetensors", "y"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    file, weight, timesteps = expected
    assert split_adapter(text) == (Path(file), weight, timesteps)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dog.safetensors=0.9@1000-500", "'1000-500' is not a range of timesteps; write FILE=0.9@500-1000"),
        ("dog.safetensors=0.9@500-", "'500-' is not a range"),
        ("dog.safetensors=0.9@500-2000", "'500-2000' is not a range"),
        ("y@early", "'early' is not a range"),
        ("dog.safetensors=heavy@5-6", "'heavy' is not a weight"),
    ],
)
def test_what_is_no_range(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "y").touch()
    with pytest.raises(QrloraError, match=words):
        split_adapter(text)


def test_a_picture_within_a_range_is_repeated(
    run: Run, adapter: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "generate --prompt a_<c>_dog --seed 5 --num-inference-steps 4 --overwrite"
    pictures: list[Image.Image] = []
    for extra in ("", f"--adapter {adapter}=40", f"--adapter {adapter}=40@0-1000", f"--adapter {adapter}=40@0-600"):
        assert run(f"{words} --output x.png {extra}") == 0
        pictures.append(Image.open(desk / "x.png").convert("RGB"))
    base, whole, covered, late = pictures
    assert ImageChops.difference(whole, covered).getbbox() is None
    for other in (base, whole):
        assert ImageChops.difference(late, other).getbbox() is not None
    assert [use.timesteps for use in read_provenance(desk / "x.png").adapters] == [(0.0, 600.0)]
    capsys.readouterr()
    assert run("generate --from x.png --output y.png") == 0
    assert "identical" in capsys.readouterr().err
    assert ImageChops.difference(Image.open(desk / "y.png").convert("RGB"), late).getbbox() is None
    assert run("inspect y.png") == 0


def test_blend_takes_two_numbers(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("blend --help")
    assert "--content-timesteps" in capsys.readouterr().out
    assert run("blend --content-timesteps 900 100") == 2
    assert "--content-timesteps 900 100 is no range of timesteps" in capsys.readouterr().err
    assert run("blend --content-timesteps early late") == 2
    assert "--content-timesteps" in capsys.readouterr().err
