"""The whole job on a tiny pipeline."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from qrlora.adapter import attach_adapter, remove_adapter
from qrlora.blend import BlendConfig, BlendResult, Painter, blend, read_provenance, roles
from qrlora.blend.provenance import SheetProvenance, read_chunk
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter
from qrlora.models import LoadedModel
from qrlora.training import Interrupted
from tests.blend.conftest import MakeConfig


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_merged_file_is_the_weighted_sum_of_the_two(made: BlendResult) -> None:
    content, style, merged = (read_adapter(path) for path in (made.content, made.style, made.merged))
    assert merged.header is not None
    assert merged.header.method == "sum"
    for name, pair in merged.layers.items():
        expected = (
            content.layers[name].B.double() @ content.layers[name].A.double()
            + style.layers[name].B.double() @ style.layers[name].A.double()
        )
        assert expected.norm() > 0
        torch.testing.assert_close(pair.delta().double(), expected, rtol=1e-5, atol=1e-6)


def test_grid_covers_all_pairs_and_starts_at_the_base(made: BlendResult) -> None:
    folder = made.sheet.parent / "pictures"
    names = {path.name for path in folder.glob("merge-*.png")}
    assert names == {f"merge-{c}-{s}.png" for c in ("0", "1") for s in ("0", "0.5", "1")}
    base = _pixels(folder / "base.png")
    assert (_pixels(folder / "merge-0-0.png") == base).all()
    for name in ("merge-1-0", "merge-0-1", "merge-0-0.5", "content", "style"):
        assert (_pixels(folder / f"{name}.png") != base).any(), name
    assert (_pixels(folder / "merged.png") == _pixels(folder / "merge-1-1.png")).all()


def test_grid_shows_what_the_merged_file_does(made: BlendResult, model: LoadedModel) -> None:
    attach_adapter(model.denoiser, read_adapter(made.merged), "merged")
    try:
        picture = model.family.generate(
            model.pipeline, ["a <c> dog in <s> style"], seeds=[0], **model.defaults.model_dump()
        )[0]
    finally:
        remove_adapter(model.denoiser, "merged")
    shown = _pixels(made.sheet.parent / "pictures" / "merge-1-1.png")
    assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - shown).max() <= 1


def test_model_is_given_back_without_adapters(made: BlendResult, model: LoadedModel) -> None:
    assert made.sheet.is_file()
    assert not getattr(model.denoiser, "peft_config", None)
    assert model.pipeline.text_encoder is not None


def test_report_tells_phases_losses_and_sizes(made: BlendResult) -> None:
    report = json.loads(made.report.read_text())
    assert {"load", "content", "style", "merge", "pictures", "sweep", "total"} == set(report["seconds"])
    content, merged = report["adapters"]["content"], report["adapters"]["merged"]
    assert content["steps"] == len(content["losses"]) == 4
    assert content["bytes"] == made.content.stat().st_size
    pairs = read_adapter(made.content).layers.values()
    # rank 4 from the tiny model's own defaults; the triangle leaves out 4 * 3 / 2 numbers a layer
    assert content["rank"] == 4
    assert content["trainable_parameters"] == sum(pair.A.numel() - 6 for pair in pairs)
    assert merged["weights"] == {"content": 1.0, "style": 1.0}
    assert report["settings"]["num_inference_steps"] == 2


def test_sweep_has_a_row_for_each_checkpoint_and_the_end(made: BlendResult) -> None:
    assert made.sweep is not None
    folder = made.sheet.parent / "pictures"
    rows = {path.name.split("-")[2] for path in folder.glob("sweep-merge-*.png")}
    assert rows == {"2", "end"}
    assert (_pixels(folder / "sweep-content-2-1.png") != _pixels(folder / "sweep-content-end-1.png")).any()
    assert (_pixels(folder / "sweep-content-end-1.png") == _pixels(folder / "content.png")).all()


def test_sweep_goes_on_with_the_role_that_trains_longer(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "style.yaml").write_text("max_train_steps: 2\n")
    config = make_config(tmp_path / "out", max_train_steps=None, style_config=tmp_path / "style.yaml", sweep_steps=2)
    told = replace(model, training={**model.training, "max_train_steps": 5})
    blend(config, loaded=told, progress=False)
    pictures = config.output / "pictures"
    assert {path.name.split("-")[2] for path in pictures.glob("sweep-merge-*.png")} == {"2", "4", "end"}
    assert (_pixels(pictures / "sweep-style-4-1.png") == _pixels(pictures / "style.png")).all()


def test_sweep_names_the_adapters_in_it(made: BlendResult) -> None:
    assert made.sweep is not None
    chunk = read_chunk(made.sweep)
    assert isinstance(chunk, SheetProvenance)
    stages = [f"train/{role}/checkpoint-2/adapter.safetensors" for role in ("content", "style")]
    assert [use.file for use in chunk.adapters] == [*stages, "content.safetensors", "style.safetensors"]
    for use in chunk.adapters:
        assert use.sha256 == hashlib.sha256((made.sweep.parent / use.file).read_bytes()).hexdigest()
    sheet = read_chunk(made.sheet)
    assert isinstance(sheet, SheetProvenance)
    assert [(use.file, use.weight) for use in sheet.adapters] == [
        ("content.safetensors", 1.0),
        ("style.safetensors", 1.0),
    ]


def test_every_picture_can_be_repeated_from_its_own_text(made: BlendResult, model: LoadedModel) -> None:
    folder = made.sheet.parent / "pictures"
    for name in ("base", "content", "merge-1-0.5", "sweep-merge-2-0.75"):
        source = folder / f"{name}.png"
        story = read_provenance(source)
        painter = Painter(model, story.model, model.defaults)
        assert painter.model_hash == story.model_hash
        weights = {}
        for index, use in enumerate(story.adapters):
            painter.attach(f"again_{index}", source.parent / use.file)
            weights[f"again_{index}"] = use.weight
        again = painter.paint(story.prompt, story.seed, weights).image
        for attached in weights:
            painter.detach(attached)
        with Image.open(source) as image:
            assert ImageChops.difference(image, again).getbbox() is None, name


def test_adapters_of_before_are_used_and_several_are_added(
    made: BlendResult, make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    config = make_config(
        tmp_path,
        content=None,
        content_prompt=None,
        content_adapter=(made.content,),
        style=None,
        style_adapter=(made.style, made.style),
        content_weights=(1.0,),
        style_weights=(0.5,),
    )
    result = blend(config, loaded=model, progress=False)
    assert result.content.read_bytes() == made.content.read_bytes()
    once, twice = read_adapter(made.style), read_adapter(result.style)
    for name, pair in twice.layers.items():
        torch.testing.assert_close(pair.delta(), 2 * once.layers[name].delta())
    # twice the style at half the weight is the style once
    again = _pixels(tmp_path / "pictures" / "merge-1-0.5.png")
    before = _pixels(made.sheet.parent / "pictures" / "merge-1-1.png")
    assert np.abs(again - before).max() <= 1
    # the caption that the adapter was trained on, where no prompt is given
    assert read_provenance(tmp_path / "pictures" / "content.png").prompt == "a photo of a <c> dog"


def test_different_bases_are_concatenated_and_the_sheet_says_so(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "style.yaml").write_text("adapter: {basis: random, rank: 3}\n")
    config = make_config(
        tmp_path / "out", style_config=tmp_path / "style.yaml", content_weights=(1.0,), style_weights=(1.0,)
    )
    result = blend(config, loaded=model, progress=False)
    merged = json.loads(result.report.read_text())["adapters"]["merged"]
    assert (merged["method"], merged["rank"]) == ("concat", 7)
    assert "concat" in merged["source"]


@pytest.mark.parametrize("name", ["content", "style"])
def test_nothing_is_written_over(
    made: BlendResult, make_config: MakeConfig, model: LoadedModel, tmp_path: Path, name: str
) -> None:
    (tmp_path / f"{name}.safetensors").write_bytes(b"mine")
    with pytest.raises(QrloraError, match=r"earlier blend .*--overwrite"):
        blend(make_config(tmp_path), loaded=model, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.safetensors"]


@pytest.mark.parametrize(
    "changes",
    [
        {"content": None, "content_adapter": ("style.safetensors",)},
        {"content": None, "content_adapter": ("merged.safetensors",)},
        {"content": None, "content_adapter": ("content.safetensors", "content.safetensors")},
        {"style": "blend.png"},
        {"style": "train/style/picture.png"},
        {"style": "pictures/merged.png"},
    ],
)
def test_overwrite_spares_what_is_given(
    changes: dict, make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    def placed(value: Path | str | tuple[str, ...] | None) -> object:
        if isinstance(value, tuple):
            return tuple(tmp_path / name for name in value)
        return None if value is None else tmp_path / value

    config = make_config(tmp_path, overwrite=True, **{key: placed(value) for key, value in changes.items()})
    with pytest.raises(QrloraError, match=r"copy it elsewhere first"):
        blend(config, loaded=model, progress=False)
    assert not list(tmp_path.iterdir())


def test_overwrite_leaves_no_picture_of_other_weights(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path
) -> None:
    short = {"content_weights": (1.0,), "max_train_steps": 1}
    blend(make_config(tmp_path, style_weights=(0.25,), **short), loaded=model, progress=False)
    blend(make_config(tmp_path, style_weights=(0.75,), overwrite=True, **short), loaded=model, progress=False)
    assert [path.name for path in (tmp_path / "pictures").glob("merge-*")] == ["merge-1-0.75.png"]


def test_interrupted_blend_continues_to_the_same_adapters(
    made: BlendResult, make_config: MakeConfig, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = roles.train, list[str]()

    def stopped(config, **options):
        calls.append(config.output_dir)
        if len(calls) < 2:
            return train(config, **options)
        return train(config, on_step=lambda done, _: done == 2 and os.kill(os.getpid(), signal.SIGINT), **options)

    monkeypatch.setattr(roles, "train", stopped)
    with pytest.raises(Interrupted):
        blend(make_config(tmp_path, sweep_steps=2), loaded=model, progress=False)
    monkeypatch.setattr(roles, "train", train)
    result = blend(make_config(tmp_path, sweep_steps=2, resume=True), loaded=model, progress=False)
    for again, before in ((result.content, made.content), (result.style, made.style)):
        for name, pair in read_adapter(again).layers.items():
            assert torch.equal(pair.A, read_adapter(before).layers[name].A)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"content": "nowhere.png"}, r"--content: there is no picture or folder nowhere\.png"),
        ({"content_prompt": None}, r"--content: .*has no caption; give --content-prompt"),
        ({"style": None}, r"bundled samples are for the embedded base; with --model give --style"),
        ({"prompt": None}, r"Give --prompt"),
        ({"style": None, "style_adapter": ("nowhere.safetensors",)}, r"nowhere\.safetensors"),
        ({"style_config": "nowhere.yaml"}, r"nowhere\.yaml cannot be read"),
        ({"method": "mean"}, r"--method mean is not known; .*concat"),
        ({"height": 33}, r"--height 33 must be a multiple of"),
        ({"style_config": "wrong.yaml"}, r"target_modules: 'attn\.to_qq' matches no"),
        ({"sweep_steps": 4}, r"--sweep-steps 4 must be less than the 4 steps"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    changes: dict,
    words: str,
    make_config: MakeConfig,
    model: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("adapter: {target_modules: [attn.to_qq]}\n")
    with pytest.raises(QrloraError, match=words):
        blend(make_config(tmp_path / "out", **changes), loaded=model, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"content": "a", "content_adapter": ("b",)}, "--content and --content-adapter exclude"),
        ({"content_adapter": ("b",), "content_config": "c"}, "--content-config says how to train"),
        ({"content_adapter": ("a",), "style_adapter": ("b",), "sweep_steps": 3}, "--sweep-steps needs something"),
        ({"style_weights": ()}, "--style-weights is empty"),
        ({"style_weights": (1, 1)}, "--style-weights names a weight twice"),
        ({"style_weight": float("nan")}, "--style-weight must be finite"),
    ],
)
def test_contradictions_are_told(changes: dict, words: str) -> None:
    with pytest.raises(QrloraError, match=words):
        BlendConfig.model_validate(changes)


def test_a_painter_heeds_its_settings_and_draws_anew_when_told(model: LoadedModel) -> None:
    painter = Painter(model, None, model.defaults)
    first = painter.paint("a <c> dog", 1, {})
    assert painter.paint("a <c> dog", 1, {}) is first
    painter.settings = model.defaults.model_copy(update={"num_inference_steps": 1, "max_sequence_length": 8})
    other = painter.paint("a <c> dog", 1, {})
    assert ImageChops.difference(other.image, first.image).getbbox() is not None
    fresh = Painter(model, None, painter.settings).paint("a <c> dog", 1, {})
    assert ImageChops.difference(other.image, fresh.image).getbbox() is None
    painter.settings = model.defaults
    assert painter.paint("a <c> dog", 1, {}) is first
    again = painter.paint("a <c> dog", 1, {}, anew=True)
    assert again is not first
    assert ImageChops.difference(again.image, first.image).getbbox() is None
