"""`qrlora analyze`: a report, and with gated adapters and their base which experts they use."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from qrlora.adapter import attach_adapter, set_adapters
from qrlora.analysis import ExpertUsage
from qrlora.blend import draw_usage, load_painter, read_provenance
from qrlora.formats import read_adapter
from tests import tiny_models
from tests.cli.conftest import Run
from tests.tiny_pipelines import flux_pipeline

FILES = "dog/adapter.safetensors ink/adapter.safetensors"
LAYER = "transformer_blocks.0.attn.add_k_proj"


def test_analyze(run: Run, adapter: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage = {"name": "content", "layers": ["a", "b"], "weights": [[0.5, 0.5], [1, 0]]}
    Path("usage.json").write_text(json.dumps(usage))
    capsys.readouterr()
    files = "dog/adapter.safetensors dog/adapter.safetensors"
    assert run(f"analyze {files} --model embedded --usage usage.json --draws 2 --output report") == 0
    said = capsys.readouterr()
    assert said.out == "report/report.html\n"
    assert "2 adapters, 1 pairs" in said.err
    report = json.loads((desk / "report" / "report.json").read_text())
    assert [facts["name"] for facts in report["adapters"]] == ["dog", "dog (2)"]
    assert report["pairs"][0]["total"]["R.cosine"]["value"] == pytest.approx(1)
    assert report["usage"]["expert_means"] == [[0.75, 0.25]]
    assert run(f"analyze {files} --output report") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("analyze dog/adapter.safetensors --output report --overwrite") == 0


def test_analyze_refuses_a_base_of_other_shapes(
    run: Run, adapter: Path, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = flux_pipeline()
    pipeline.transformer = tiny_models.tiny_flux(width=64)
    pipeline.save_pretrained(desk / "wide")
    capsys.readouterr()
    assert run("analyze dog/adapter.safetensors --model wide --output report") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"dog/adapter\.safetensors adapts \S+ as a weight of shape \[32, 32\], but here it has \[64, 64\]", said
    )
    assert not (desk / "report").exists()


@pytest.fixture
def gated(run: Run, desk: Path) -> dict[str, Path]:
    """Two gated adapters, each trained for two steps."""
    for name, caption in (("dog", "a_<c>_dog"), ("ink", "a_cat_in_<s>")):
        data = f"--instance-data-dir {name}.png --instance-prompt {caption} --output-dir {name}"
        assert run(f"train {data} --adapter.rank 8 --adapter.experts 4 --learning_rate 0.1 --max-train-steps 2") == 0
    return {name: desk / name / "adapter.safetensors" for name in ("dog", "ink")}


def seen(model: Path, files: dict[str, Path], prompts: list[str], seed: int) -> Tensor:
    """All tokens that pass `LAYER` while the model draws with the adapters, `[tokens, in]`."""
    painter = load_painter(str(model), None)
    denoiser: Any = painter.loaded.denoiser
    for name, file in files.items():
        attach_adapter(denoiser, read_adapter(file), name)
    set_adapters(denoiser, dict.fromkeys(files, 1.0))
    tokens: list[Tensor] = []
    denoiser.get_submodule(LAYER).register_forward_pre_hook(lambda _, x: tokens.append(x[0].detach().flatten(0, -2)))
    loaded, settings = painter.loaded, painter.settings
    for prompt in prompts:
        encoded = [
            loaded.family.encode_prompts(loaded.pipeline, [text], settings.max_sequence_length)
            for text in (prompt, settings.negative_prompt)
        ]
        loaded.family.generate(
            loaded.pipeline,
            [prompt],
            seeds=[seed],
            conditioning=encoded[0],
            negative_conditioning=encoded[1],
            **settings.model_dump(),
        )
    return torch.cat(tokens).double()


def shares(file: Path, tokens: Tensor) -> Tensor:
    """The mean of softmax(G x + b), from the file's own tensors."""
    stored = load_file(file)
    weight, bias = (stored[f"transformer.{LAYER}.gated.{key}"].double() for key in ("gate_weight", "gate_bias"))
    return torch.softmax(tokens @ weight.T + bias, dim=-1).mean(dim=0)


def test_one_command_draws_records_and_shows(
    run: Run, gated: dict[str, Path], desk: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--prompt a_<c>_dog --prompt a_<c>_cat_in_<s> --prompt a_<c>_dog --seed 3 --draws 2"
    capsys.readouterr()
    assert run(f"analyze {FILES} --model embedded {words} --output report") == 0
    said = capsys.readouterr()
    assert said.out == "report/report.html\n"
    assert "drawing 2 pictures with dog, ink" in said.err
    report = json.loads((desk / "report" / "report.json").read_text())
    prompts = ["a <c> dog", "a <c> cat in <s>"]
    tokens = seen(tiny_flux, gated, prompts, 3)
    for index, (name, file) in enumerate(gated.items()):
        usage = ExpertUsage.read(desk / "report" / f"{name}-usage.json")
        assert usage.model_dump() == report["usage"]["usages"][index]
        assert (usage.name, usage.prompts) == (name, prompts)
        assert set(usage.layers) == set(read_adapter(file).layers)
        row = torch.tensor(usage.weights[usage.layers.index(LAYER)]).double()
        torch.testing.assert_close(row, shares(file, tokens), rtol=0, atol=1e-5)
    assert [pair["layers"] for pair in report["usage"]["comparisons"]] == [report["usage"]["usages"][0]["layers"]]
    assert "R.cosine" in report["pairs"][0]["total"]
    assert not any("experts is left out" in note for note in report["notes"])
    pictures = ["usage-1", "usage-2", "usage-entropy", "usage-experts", "usage-1-2-difference", "usage-1-2-cosine"]
    for picture in pictures:
        with Image.open(desk / "report" / f"{picture}.png") as image:
            image.load()
    for index, prompt in enumerate(prompts, start=1):
        made = read_provenance(desk / "report" / f"drawn-{index}.png")
        assert (made.prompt, made.seed) == (prompt, 3)
        assert [(use.file, use.weight) for use in made.adapters] == [
            (f"../{name}/adapter.safetensors", 1.0) for name in gated
        ]
    page = (desk / "report" / "report.html").read_text()
    assert "Recorded while the model drew “a &lt;c&gt; dog” and 1 more." in page
    assert "Every layer: experts of ink" in page
    assert page.count(f"<td>{LAYER}</td>") == 3  # of the pair, and of each usage


def test_captions_are_the_prompts_and_recorded_usage_stands_beside(
    run: Run, gated: dict[str, Path], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"analyze {FILES} {FILES} --model embedded --draws 2 --output first") == 0
    assert "drawing 2 pictures" in capsys.readouterr().err
    found = {path.name for path in (desk / "first").glob("*.json")}
    assert found == {"report.json", *(f"{name}-usage.json" for name in ("dog", "ink", "dog (2)", "ink (2)"))}
    assert ExpertUsage.read(desk / "first" / "ink-usage.json").prompts == ["a <c> dog", "a cat in <s>"]
    assert run(f"analyze {FILES} --model embedded --usage first/dog-usage.json --draws 2 --output second") == 0
    usages = json.loads((desk / "second" / "report.json").read_text())["usage"]["usages"]
    assert [usage["name"] for usage in usages] == ["dog", "dog (2)", "ink"]
    # Four adapters of which two are the others again draw another picture than two, so the gates see other tokens.
    assert usages[0]["weights"] != usages[1]["weights"]


def test_what_is_left_out_is_said(
    run: Run, gated: dict[str, Path], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def notes(folder: str) -> list[str]:
        report = json.loads((desk / folder / "report.json").read_text())
        assert report["usage"] is None
        return [note for note in report["notes"] if "experts is left out" in note]

    assert run("analyze dog/adapter.safetensors --output without-model") == 0
    (note,) = notes("without-model")
    assert "gates of dog" in note
    assert "--model" in note
    adapter = read_adapter(gated["dog"])
    assert adapter.header is not None
    header = adapter.header.model_copy(update={"training": {"captions": "none"}})
    type(adapter)(adapter.layers, header, own=adapter.own).save(desk / "bare.safetensors")
    capsys.readouterr()
    assert run("analyze bare.safetensors --model embedded --output without-captions") == 0
    assert "bare name no captions to draw, so give --prompt" in capsys.readouterr().err
    assert "--prompt" in notes("without-captions")[0]
    assert not list((desk / "without-captions").glob("drawn*"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "analyze dog/adapter.safetensors --prompt x --output r",
            "--prompt is what the base model draws .* add --model",
        ),
        (
            "analyze plain/adapter.safetensors --model embedded --prompt x --output r",
            "none of plain is gated; drop it",
        ),
        ("analyze dog/adapter.safetensors --model embedded --device marble --output r", "--device marble"),
        ("analyze dog/adapter.safetensors --seed -1 --output r", "--seed -1 is not valid"),
    ],
)
def test_refusals(
    line: str, words: str, run: Run, gated: dict[str, Path], desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "--instance-data-dir dog.png --instance-prompt a_<c>_dog --output-dir plain"
    assert run(f"train {data} --max-train-steps 1") == 0
    capsys.readouterr()
    assert run(line) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(words, said)
    assert not (desk / "r").exists()


def test_pictures_drawn_before_are_recorded_again(gated: dict[str, Path], tiny_flux: Path) -> None:
    painter = load_painter(str(tiny_flux), None)
    once, again = (draw_usage(painter, {"dog": gated["dog"]}, ["a <c> dog"], 3).usages for _ in range(2))
    assert once == again
