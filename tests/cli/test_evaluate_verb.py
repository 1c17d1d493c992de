"""`qrlora evaluate`: pictures that are there, a blend's folder, and pictures that adapters draw."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.blend import read_provenance
from qrlora.evaluation import EfficientNetFeatures
from tests import tiny_models
from tests.cli.conftest import Run
from tests.tiny_pipelines import flux_pipeline

DRAW = "evaluate --adapter dog/adapter.safetensors=0.5 --prompt a_<c>_dog --content dog.png --num-images 2"


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def cosine(one: Path, other: Path) -> float:
    """Of EfficientNet's features of two pictures, each cut to its centred square."""
    rows = []
    for path in (one, other):
        with Image.open(path) as image:
            picture = image.convert("RGB")
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        array = np.asarray(picture.crop((left, top, left + side, top + side)))
        rows.append(EfficientNetFeatures()(array[None].copy())[0].double())
    return float(rows[0] @ rows[1] / (rows[0].norm() * rows[1].norm()))


def test_pictures_of_any_tool(run: Run, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "made").mkdir()
    for name in ("one", "two"):
        Image.open("dog.png").rotate(90 if name == "two" else 0, expand=True).save(f"made/{name}.png")
    line = "evaluate made --content dog.png --style ink.png --truth dog.png --output r"
    assert run(line) == 0
    said = capsys.readouterr()
    assert said.out == "r/report.html\n"
    report = report_of(desk / "r")
    assert [row["name"] for row in report["pictures"]] == ["one", "two"]
    one, two = (row["scores"] for row in report["pictures"])
    assert one["content.efficientnet"] == pytest.approx(1)
    assert two["content.efficientnet"] == pytest.approx(cosine(desk / "made/two.png", desk / "dog.png"), abs=1e-5)
    assert (one["truth.efficientnet"], one["truth.pixels"]) == (pytest.approx(0, abs=1e-6), 0)
    assert report["measures"]["content.efficientnet"]["other"] == pytest.approx(
        cosine(desk / "ink.png", desk / "dog.png"), abs=1e-5
    )
    assert run(line) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_blend_by_its_folder(run: Run, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--content-prompt a_<c>_dog --style-prompt a_cat_in_<s> --prompt a_<c>_dog_in_<s>"
    grid = "--content-weights 0 0.5 1 --style-weights 0 1 --max-train-steps 2 --learning-rate 0.1"
    assert run(f"blend --content dog.png --style ink.png {words} {grid} --output out") == 0
    capsys.readouterr()
    assert run("evaluate out --output r") == 0
    report = report_of(desk / "r")
    assert (report["content"], report["style"]) == (["dog"], ["ink"])
    weights = [(row["weights"]["content"], row["weights"]["style"]) for row in report["pictures"]]
    grid_of = [(c, s) for c in (0, 0.5, 1) for s in (0, 1)]
    # The base and the merge are in the grid; the references' own prompts make two pictures more.
    assert weights[:6] == grid_of
    assert sorted(weights[6:]) == [(0, 1), (1, 0)]
    assert "2 pictures were made just like another" in " ".join(report["notes"])
    groups = [group["name"] for group in report["groups"]]
    assert groups[:3] == ["base", "style 1", "content 0.5"]
    assert "content 1, “a <c> dog”" in groups
    row = report["pictures"][groups.index("content 0.5, style 1")]
    assert row["prompt"] == "a <c> dog in <s>"
    assert row["scores"]["content.efficientnet"] == pytest.approx(
        cosine(desk / "out/pictures/merge-0.5-1.png", desk / "dog.png"), abs=1e-5
    )
    assert (desk / "r" / "weights.png").is_file()
    (desk / "dog.png").unlink()
    assert run("evaluate out/blend.png --output again") == 0
    assert "The content is of dog.png, which is no picture here" in report_of(desk / "again")["notes"][0]
    (desk / "out/pictures/merge-1-1.png").unlink()
    capsys.readouterr()
    assert run("evaluate out --style ink.png --output third") == 2
    assert "merge-1-1.png is not there" in capsys.readouterr().err


def test_what_adapters_draw_and_how_they_drift(
    run: Run, adapter: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    second = "--adapter dog/adapter.safetensors=-1 --drift-prompt a_tree --drift-prompt a_house"
    assert run(f"{DRAW} {second} --seed 3 --output r") == 0
    assert "drawing 12 pictures" in capsys.readouterr().err
    report = report_of(desk / "r")
    assert [group["name"] for group in report["groups"]] == ["base", "dog 0.5", "dog (2) -1", "dog 0.5, dog (2) -1"]
    assert [row["seed"] for row in report["pictures"]] == [3, 4] * 4
    assert [each["group"] for each in report["differences"]] == [group["name"] for group in report["groups"][1:]]
    made = read_provenance(desk / "r/pictures/all-4.png")
    assert (made.prompt, made.seed, [use.weight for use in made.adapters]) == ("a <c> dog", 4, [0.5, -1])
    assert read_provenance(desk / "r/pictures/base-4.png").adapters == ()
    (drift,) = report["drift"]
    assert (drift["metric"], drift["prompts"]) == ("efficientnet", ["a_tree", "a_house"])
    for number, value in enumerate(drift["values"], start=1):
        names = [desk / f"r/pictures/drift-{number}-{kind}.png" for kind in ("base", "adapters")]
        assert value == pytest.approx(1 - cosine(*names), abs=1e-5)
        one, other = map(read_provenance, names)
        assert (one.seed, one.prompt) == (other.seed, other.prompt)
    assert drift["mean"]["mean"] == pytest.approx(np.mean(drift["values"]))
    assert run("generate --from r/pictures/all-4.png --output again.png") == 0
    assert "identical" in capsys.readouterr().err


def test_drift_of_the_embedded_base_has_its_own_prompts(run: Run, adapter: Path, desk: Path) -> None:
    assert run(f"{DRAW} --num-inference-steps 1 --output r") == 0
    prompts = report_of(desk / "r")["drift"][0]["prompts"]
    assert len(set(prompts)) == 10
    assert all("emoji" in prompt for prompt in prompts)
    assert run(f"{DRAW} --num-inference-steps 1 --no-drift --output without") == 0
    assert report_of(desk / "without")["drift"] == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evaluate --output r", "what is to be scored"),
        ("evaluate nowhere.png --content dog.png --output r", "no picture or folder nowhere.png"),
        ("evaluate dog.png --content nowhere.png --output r", "--content: there is no picture or folder nowhere.png"),
        ("evaluate dog.png --output r", "nothing to compare the pictures with; give --content"),
        ("evaluate dog.png --content ink.png --metrics look --output r", "no metric of content.*add efficientnet"),
        ("evaluate dog.png --content ink.png --metrics efficient --output r", "did you mean efficientnet"),
        ("evaluate dog.png --content ink.png --metric-model dinov2 --output r", "--metric-model dinov2 is not METRIC="),
        ("evaluate dog.png --content ink.png --metric-model dinov2=./x --output r", "dinov2: there is no model folder"),
        ("evaluate dog.png --content ink.png --truth nowhere --output r", "--truth: there is no picture or folder"),
        ("evaluate dog.png --content ink.png --gallery nowhere --output r", "--gallery: there is no picture or folder"),
        ("evaluate dog.png --content ink.png --wanted dog --output r", "add --gallery"),
        ("evaluate dog.png --content ink.png --gallery . --wanted cat --output r", "no picture called cat"),
        ("evaluate dog.png --content ink.png --num-images 3 --output r", "--num-images is for drawing"),
        ("evaluate dog.png --content ink.png --device marble --output r", "--device marble"),
        ("evaluate dog.png --adapter x --content ink.png --output r", "not both"),
        ("evaluate --adapter x.safetensors --content ink.png --output r", "say what to draw"),
        ("evaluate --adapter x.safetensors --prompt x --content ink.png --output r", "x.safetensors"),
        ("evaluate --adapter x --prompt x --drift-prompt y --no-drift --output r", "exclude each other"),
        ("evaluate dog.png --content ink.png --resamples 3 --output r", "--resamples 3 is not valid"),
    ],
)
def test_refusals(line: str, words: str, run: Run, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 2
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("qrlora: ")]
    assert re.search(words, said)
    assert not (desk / "r").exists()


def test_adapters_of_another_base_are_refused(
    run: Run, adapter: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    pipeline = flux_pipeline()
    pipeline.transformer = tiny_models.tiny_flux(width=64)
    pipeline.save_pretrained(desk / "wide")
    capsys.readouterr()
    assert run(f"{DRAW} --model wide --output r") == 2
    assert "dog/adapter.safetensors" in capsys.readouterr().err
    assert not (desk / "r").exists()


def test_validation_pictures_are_grouped_by_step(run: Run, desk: Path) -> None:
    data = "--instance-data-dir dog.png --instance-prompt a_<c>_dog --output-dir dog --max-train-steps 2"
    assert run(f"train {data} --validation-prompt a_<c>_dog --validation-steps 1") == 0
    folder = next(path.parent for path in sorted((desk / "dog").rglob("*.png")))
    assert run(f"evaluate {folder} --content dog.png --output r") == 0
    groups = [group["name"] for group in report_of(desk / "r")["groups"]]
    assert {"step 1", "step 2"} <= set(groups)
