"""Methods on the command line that need the model or act while drawing."""

from pathlib import Path

import pytest
from PIL import Image, ImageChops

from qrlora.blend import read_provenance
from qrlora.formats import read_adapter
from tests.cli.conftest import Run


@pytest.fixture
def style(run: Run, desk: Path) -> Path:
    words = (
        "train --instance-data-dir ink.png --instance-prompt <s>_style --output-dir ink --max-train-steps 2 --seed 1"
    )
    assert run(words) == 0
    return desk / "ink" / "adapter.safetensors"


def test_zip_finds_model_and_captions(
    run: Run, adapter: Path, style: Path, desk: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = "--option steps=3 --option pictures=1 --option num_inference_steps=2"
    assert run(f"merge {adapter} {style} --method zip {quick} --output zip.safetensors --device cpu") == 0
    said = capsys.readouterr().err
    assert "zip: 3/3 loss " in said
    assert "2 adapters merged by zip: rank 4," in said
    named = read_adapter(desk / "zip.safetensors")
    assert named.header is not None
    assert (named.header.method, named.header.rank, named.header.side) == ("zip", 4, "output")
    assert run(f"merge {adapter} {style} --method zip {quick} --output x.safetensors --model {tiny_sd3}") == 2
    assert run(f"merge {adapter} {style} --method zip --option steps=none --output x.safetensors") == 2
    assert "steps='none' is not valid" in capsys.readouterr().err
    assert run(f"merge {adapter} {style} --method sum --output x.safetensors --device cpu") == 2
    assert "--device is for methods that learn on the base model, such as zip; drop it" in capsys.readouterr().err
    assert not (desk / "x.safetensors").exists()


def test_k_lora_draws_and_makes_no_file(
    run: Run, adapter: Path, style: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"generate --prompt a_<c>_dog --num-inference-steps 4 --overwrite --adapter {adapter}=40 --adapter {style}=40"
    )
    pictures: list[Image.Image] = []
    for extra in ("", "--method k-lora", "--method k-lora --option scale=s"):
        assert run(f"{words} --output x.png {extra}") == 0
        pictures.append(Image.open(desk / "x.png").convert("RGB"))
    for one, other in ((0, 1), (0, 2)):
        assert ImageChops.difference(pictures[one], pictures[other]).getbbox() is not None
    method = read_provenance(desk / "x.png").method
    assert method is not None
    assert (method.name, method.options) == ("k-lora", {"scale": "s"})
    capsys.readouterr()
    assert run("generate --from x.png --output y.png") == 0
    assert "identical" in capsys.readouterr().err
    assert run("inspect y.png") == 0
    for line, said in (
        (f"merge {adapter} {style} --method k-lora --output x.safetensors", "which no file can hold; draw with it:"),
        (f"{words} --output x.png --adapter {adapter} --method k-lora", "in this order; 3 were given"),
        (f"{words} --output x.png --method sum", "'sum' is no method that acts while a picture is drawn"),
        (f"{words} --output x.png --option scale=s", "--option scale=s is of a method; give --method too"),
        ("generate --from x.png --output z.png --method k-lora", "--from repeats x.png as it is; drop --method"),
        ("generate --from x.png --output z.png --option scale=s", "drop --option"),
    ):
        assert run(line) == 2
        assert said in capsys.readouterr().err
    assert not (desk / "x.safetensors").exists()
