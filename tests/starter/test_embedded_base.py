"""The embedded base as it ships: an ordinary FLUX pipeline that stock diffusers loads, with one token a trigger."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from benchmarks.fusion.config import load_plan
from benchmarks.fusion.report import share
from qrlora import starter
from qrlora.blend import BlendConfig
from qrlora.blend.roles import ROLES, fill_trainings, plan_parts
from qrlora.blend.weights import weights_of
from qrlora.errors import QrloraError
from qrlora.models import load_pipeline

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fusion"
TRIGGERS = ["<c>", "<s>", *(f"<v{i}>" for i in range(1, 9))]


@pytest.fixture(scope="module")
def stock() -> FluxPipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own notices on loading
        pipeline = FluxPipeline.from_pretrained(starter.path(), torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_small_enough_to_ship() -> None:
    size = sum(file.stat().st_size for file in starter.path().parent.rglob("*") if file.is_file())
    assert size <= 40e6


def test_it_has_the_layout_of_flux(stock: FluxPipeline) -> None:
    assert stock.vae_scale_factor == 8
    assert stock.vae.config.latent_channels == 16
    assert stock.transformer.config.in_channels == 64


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_every_trigger_is_one_token_in_both_tokenizers(stock: FluxPipeline, trigger: str) -> None:
    for tokenizer in (stock.tokenizer, stock.tokenizer_2):
        plain = tokenizer("a dog emoji").input_ids
        triggered = tokenizer(f"a {trigger} emoji").input_ids
        assert tokenizer.convert_tokens_to_ids(trigger) in triggered
        assert len(triggered) <= len(plain) + 1


@pytest.mark.parametrize("text", ["Ünïcode 漢字", "a tree\N{EVERGREEN TREE}!", "", "a 'quoted' “word”"])
def test_any_text_has_tokens(stock: FluxPipeline, text: str) -> None:
    decoded = stock.tokenizer_2.decode(stock.tokenizer_2(text).input_ids, skip_special_tokens=True)
    assert decoded.strip() == text.lower()


def test_stock_diffusers_draws_what_we_draw(stock: FluxPipeline) -> None:
    ours = load_pipeline(starter.path())
    settings = {**ours.defaults.model_dump(), "num_inference_steps": 3}
    prompt = "a red apple emoji in noto style"
    drawn = ours.family.generate(ours.pipeline, [prompt], seeds=[3], **settings)[0]
    theirs = stock(prompt, generator=torch.Generator().manual_seed(3), **settings).images[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(theirs))


def test_its_settings_are_short_and_guided() -> None:
    settings = json.loads((starter.path() / "qrlora.json").read_text(encoding="utf-8"))
    assert settings["generation"]["max_sequence_length"] == 32
    assert settings["generation"]["true_cfg_scale"] > 1
    assert settings["generation"]["negative_prompt"] == ""


def test_what_it_wants_of_a_blend_is_what_is_best_in_the_fusion_benchmark(tmp_path: Path) -> None:
    results = json.loads((RESULTS / "test.json").read_text(encoding="utf-8"))
    shares = {
        name: np.mean([share(each["best"]) for each in found["shots"].values()])
        for name, found in results["methods"].items()
    }
    best = max(shares, key=lambda name: shares[name])
    method, stage, chosen = load_plan().method(best), results["stage"], results["methods"][best]
    config, model = BlendConfig(output=tmp_path), load_pipeline(starter.path())
    parts, _ = plan_parts(config)
    fill_trainings(parts, model)
    steps = {"content": stage["steps"]["content"], "style": stage["steps"]["style"]["1"]}
    for role in ROLES:
        training = parts[role].training
        assert training is not None
        assert training.adapter.basis == method.adapter["basis"]
        assert training.learning_rate == chosen["rate"]
        assert (training.max_train_steps, training.train_batch_size) == (steps[role], stage["batch"])
        for key, value in method.training.get(role, {}).items():
            assert getattr(training, key) == (tuple(value) if isinstance(value, list) else value)
    weights = weights_of(config, model)
    assert [weights.content, weights.style] == chosen["shots"]["1"]["weights"]


def test_another_basis_is_not_trained_at_the_rate_of_the_models_own(tmp_path: Path) -> None:
    model = load_pipeline(starter.path())
    rates = {}
    for basis in (None, "lora", "qr"):
        parts, _ = plan_parts(BlendConfig(output=tmp_path, basis=basis))
        fill_trainings(parts, model)
        rates[basis] = {part.training.learning_rate for part in parts.values() if part.training is not None}
    assert rates[None] == rates["lora"] == {model.roles["content"]["learning_rate"]}
    assert rates["qr"] == {model.training["learning_rate"]}
    assert rates["qr"] != rates["lora"]


def test_samples_are_pictures_of_the_bases_size() -> None:
    samples = starter.samples()
    for picture in (samples.content, samples.style):
        with Image.open(picture) as image:
            assert image.size == (load_pipeline(starter.path()).defaults.width,) * 2
    assert "<c>" in samples.content_prompt
    assert "<s>" in samples.style_prompt
    assert {"<c>", "<s>"} <= set(samples.prompt.split())


def test_a_broken_installation_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(starter, "_HERE", tmp_path)
    with pytest.raises(QrloraError, match="lacks its model folder"):
        starter.path()
