"""Pictures by k-lora: against the stock pipeline with its layers switched by hand, in provenance, and in a blend."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qrlora.adapter import adapter_of
from qrlora.blend import BlendConfig, Painter, RunTime, blend, read_provenance
from qrlora.blend.provenance import read_chunk
from qrlora.errors import QrloraError
from qrlora.merging import k_lora
from qrlora.models import LoadedModel
from tests.blend.conftest import MakeConfig
from tests.blend.test_timesteps import PROMPT, SEED, WEIGHTS, _same, _stock, painter  # noqa: F401

K_LORA = RunTime(name="k-lora", options={"scale": "s"})


def test_layers_are_switched_by_step(painter: Painter) -> None:  # noqa: F811
    denoiser = painter.loaded.denoiser
    rule = k_lora([adapter_of(denoiser, name) for name in WEIGHTS], scale="s")
    painter.loaded.pipeline.set_progress_bar_config(disable=True)
    denoiser.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))
    counts: list[int] = []

    def by_hand(timestep: float) -> None:
        f = 1.5 * (1 - timestep / 1000) + 0.5
        content = [name for name, threshold in rule.thresholds.items() if f < threshold]
        counts.append(len(content))
        for name, layer in denoiser.named_modules():
            if name in rule.thresholds:
                layer.set_adapter("content" if name in content else "style")

    by_hand(1000.0 if painter.loaded.family.name != "sdxl" else float(_first_timestep(painter)))
    expected = _stock(painter, by_hand)
    assert len(counts) == 6
    assert counts == sorted(counts, reverse=True)  # the style takes over
    assert counts[0] > counts[-1]
    found = painter.paint(PROMPT, SEED, WEIGHTS, method=K_LORA)
    assert _same(found.image, expected)
    both = painter.paint(PROMPT, SEED, WEIGHTS)
    assert not _same(found.image, both.image)
    assert (found.method, both.method) == (K_LORA, None)
    # The order says which is the content.
    other = painter.paint(PROMPT, SEED, dict(reversed(WEIGHTS.items())), method=K_LORA)
    assert not _same(other.image, found.image)
    for weights in ({"content": 0.9, "style": 0.0}, {"content": 0.0, "style": 0.0}):
        alone = painter.paint(PROMPT, SEED, weights, method=K_LORA)
        assert alone is painter.paint(PROMPT, SEED, weights)  # nothing to choose from


def _first_timestep(painter: Painter) -> float:  # noqa: F811
    scheduler = painter.loaded.pipeline.scheduler
    scheduler.set_timesteps(painter.settings.num_inference_steps)
    return scheduler.timesteps[0]


@pytest.mark.parametrize("painter", ["tiny_flux"], indirect=True)
def test_the_picture_knows_its_method(painter: Painter, tmp_path: Path) -> None:  # noqa: F811
    picture = painter.paint(PROMPT, SEED, WEIGHTS, method=K_LORA)
    story = read_provenance(painter.save(picture, tmp_path / "x.png"))
    assert story.method == K_LORA
    plain = painter.save(painter.paint(PROMPT, SEED, WEIGHTS), tmp_path / "y.png")
    with Image.open(plain) as image:
        assert "method" not in json.loads(image.text["qrlora"])  # type: ignore[attr-defined]
    for weights, ranges, method, words in (
        (WEIGHTS, {"content": (0.0, 500.0)}, K_LORA, "--method k-lora chooses by timestep itself"),
        ({"content": 1.0}, None, K_LORA, "between a content and a style, in this order; 1 were given"),
        (WEIGHTS, None, RunTime(name="ties"), "'ties' is no method that acts while a picture is drawn"),
        (WEIGHTS, None, RunTime(name="k-lora", options={"scale": "t"}), "scale='t' is not valid"),
    ):
        with pytest.raises(QrloraError, match=words):
            painter.paint(PROMPT, SEED, weights, ranges, method=method)


def test_a_blend_by_k_lora_has_no_merged_file(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "merged.safetensors").write_bytes(b"of an earlier blend")
    config = make_config(tmp_path / "out", sweep_steps=1, max_train_steps=2, method="k-lora", overwrite=True)
    made = blend(config, loaded=model, progress=False)
    assert made.merged is None
    assert not (tmp_path / "out" / "merged.safetensors").exists()
    report = json.loads(made.report.read_text())
    assert sorted(report["adapters"]) == ["content", "style"]

    def method(path: Path) -> Any:
        return getattr(read_chunk(path), "method", None)

    folder, used = tmp_path / "out" / "pictures", RunTime(name="k-lora")
    for name in ("merge-1-1", "merge-1-0.5", "merged", "sweep-merge-1-0.75"):
        assert method(folder / f"{name}.png") == used
    for name in ("merge-1-0", "content", "base"):
        assert method(folder / f"{name}.png") is None
    assert made.sweep is not None
    assert (method(made.sheet), method(made.sweep)) == (used, used)


def test_ranges_beside_k_lora_are_refused(tmp_path: Path) -> None:
    config = BlendConfig(method="k-lora", content_timesteps=(500, 1000), output=tmp_path / "out")
    with pytest.raises(QrloraError, match="--method k-lora chooses by timestep itself; drop --content-timesteps"):
        blend(config)
    with pytest.raises(QrloraError, match=r"--method k is not known; the known ones are auto, .*, k-lora"):
        blend(config.model_copy(update={"method": "k"}))


def test_a_blend_by_zip_learns_on_its_model(make_config: MakeConfig, model: LoadedModel, tmp_path: Path) -> None:
    made = blend(make_config(tmp_path / "out", method="zip", max_train_steps=1), loaded=model, progress=False)
    report = json.loads(made.report.read_text())
    assert report["adapters"]["merged"]["method"] == "zip"
    assert not hasattr(model.denoiser, "peft_config")
