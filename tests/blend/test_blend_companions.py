"""Pictures and blends with adapters whose text encoders were adapted too."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.adapter import pipeline_adapter_names
from qrlora.blend import BlendResult, Painter, blend
from qrlora.cli import main
from qrlora.errors import QrloraError
from qrlora.formats import read_adapter
from qrlora.models import BlockStream, LoadedModel, load_pipeline
from tests.adapter.test_text_encoders import ENCODERS, adapt
from tests.blend.conftest import MakeConfig

PROMPT = "a <c> dog in <s> style"


@pytest.fixture(scope="module", params=["flux", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{kind}")


@pytest.fixture(scope="module")
def files(kind: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters with companions on one model, and the second without."""
    target, pipeline = tmp_path_factory.mktemp("adapters"), load_pipeline(folder).pipeline
    made = {name: adapt(kind, pipeline, name, seed) for seed, name in enumerate(("content", "style"))}
    made["bare"] = made["style"].alone()
    return {name: adapter.save(target / f"{name}.safetensors") for name, adapter in made.items()}


@pytest.fixture
def painter(folder: Path, files: dict[str, Path]) -> Painter:
    loaded = load_pipeline(folder)
    painter = Painter(loaded, str(folder), loaded.defaults)
    for name, path in files.items():
        painter.attach(name, path)
    return painter


def pixels(picture: Any) -> Any:
    return np.asarray(getattr(picture, "image", picture))


def stock(folder: Path, weights: dict[str, float], files: dict[str, Path]) -> Image.Image:
    """The same picture by stock diffusers, from the prompt on."""
    loaded: Any = load_pipeline(folder)
    pipeline, settings = loaded.pipeline, loaded.defaults.model_dump()
    for name in weights:
        pipeline.load_lora_weights(str(files[name].parent), weight_name=files[name].name, adapter_name=name)
    if weights:
        pipeline.set_adapters(list(weights), list(weights.values()))
    pipeline.set_progress_bar_config(disable=True)
    if loaded.family.name == "sdxl":
        for name in ("true_cfg_scale", "max_sequence_length", "negative_prompt"):
            del settings[name]
    return pipeline(prompt=PROMPT, generator=torch.Generator().manual_seed(3), **settings).images[0]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize(
    "weights", [{}, {"content": 0.9}, {"content": 0.9, "style": 1.1}, {"content": 0.9, "bare": 1.1}], ids=str
)
def test_a_picture_is_the_stock_pipelines(
    painter: Painter, folder: Path, files: dict[str, Path], weights: dict[str, float]
) -> None:
    painter.paint(PROMPT, 3, {"style": 1.0, "content": -1.0})  # leaves its mark on nothing
    difference = np.abs(pixels(painter.paint(PROMPT, 3, weights)).astype(int) - pixels(stock(folder, weights, files)))
    assert difference.max() <= (1 if weights else 0)


def test_weights_reach_the_encoders_and_zero_is_the_base(painter: Painter) -> None:
    base = pixels(painter.paint(PROMPT, 3, {}))
    assert np.array_equal(pixels(painter.paint(PROMPT, 3, {"content": 0.0, "style": 0.0})), base)
    style, bare = (pixels(painter.paint(PROMPT, 3, {name: 1.0})) for name in ("style", "bare"))
    assert not np.array_equal(style, bare)
    assert not np.array_equal(pixels(painter.paint(PROMPT, 3, {"style": 0.5})), style)
    again = Painter(painter.loaded, painter.model, painter.settings)
    again._files.update(painter._files)
    assert np.array_equal(pixels(again.paint(PROMPT, 3, {"style": 1.0})), style)
    assert np.array_equal(pixels(again.paint(PROMPT, 3, {})), base)


def test_prompts_are_encoded_once_for_equal_words(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    family, calls = type(painter.loaded.family), list[str]()
    real: Callable[..., Any] = family.encode_prompts
    monkeypatch.setattr(
        family, "encode_prompts", lambda self, pipe, prompts, n: calls.extend(prompts) or real(self, pipe, prompts, n)
    )
    for weights in (
        {},
        {"bare": 1.0},
        {"bare": 0.5},
        {"content": 1.0},
        {"content": 1.0, "bare": 1.0},
        {"content": 0.5},
    ):
        for seed in (1, 2):
            painter.paint(PROMPT, seed, weights)
    assert calls.count(PROMPT) == 3  # none, content at 1, content at 0.5


def test_another_file_under_the_same_name_is_read_anew(painter: Painter, files: dict[str, Path]) -> None:
    style = pixels(painter.paint(PROMPT, 3, {"style": 1.0}))
    content = pixels(painter.paint(PROMPT, 3, {"content": 1.0}))
    painter.detach("style")
    painter.attach("style", files["content"])
    assert np.array_equal(pixels(painter.paint(PROMPT, 3, {"style": 1.0})), content)
    assert not np.array_equal(style, content)


def test_within_a_range_the_prompt_is_read_with_the_adapter(painter: Painter) -> None:
    never = pixels(painter.paint(PROMPT, 3, {"style": 1.0}, {"style": (0.0, 0.0)}))
    assert not np.array_equal(never, pixels(painter.paint(PROMPT, 3, {})))
    assert not np.array_equal(never, pixels(painter.paint(PROMPT, 3, {"style": 1.0})))


def test_an_adapter_of_words_alone_beside_a_range(painter: Painter, files: dict[str, Path], tmp_path: Path) -> None:
    words = replace(read_adapter(files["content"]).companions["text_encoder"], companions={})
    painter.attach("words", words.save(tmp_path / "words.safetensors"))
    weights = {"words": 1.0, "bare": 1.0}
    never = pixels(painter.paint(PROMPT, 3, weights, {"bare": (0.0, 0.0)}))
    assert np.array_equal(never, pixels(painter.paint(PROMPT, 3, {"words": 1.0})))
    with pytest.raises(QrloraError, match=r"words\.safetensors adapts text encoders alone, which act at all timesteps"):
        painter.paint(PROMPT, 3, weights, {"words": (0.0, 500.0)})


def test_what_cannot_be_placed_is_taken_off_again(
    painter: Painter, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_model: LoadedModel) -> None:
        raise MemoryError

    monkeypatch.setattr(LoadedModel, "settle", failing)
    with pytest.raises(MemoryError):
        painter.attach("again", files["content"])
    assert "again" not in (*painter._files, *pipeline_adapter_names(painter.loaded.pipeline))


def test_streamed_encoders_are_settled_too(
    folder: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_pipeline(folder, offload="blocks", encoder_offload="blocks")
    painter, settled = Painter(loaded, None, loaded.defaults), list[Any]()
    monkeypatch.setattr(BlockStream, "settle", lambda stream: settled.append(stream.model))
    painter.attach("content", files["content"])
    assert {loaded.denoiser, loaded.pipeline.text_encoder} <= set(settled)


def test_generate_and_repeat(
    folder: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    adapters = ["--adapter", f"{files['content']}=0.9", "--adapter", f"{files['style']}=1.1"]
    assert main(["generate", "--model", str(folder), "--prompt", PROMPT, *adapters, "--output", str(picture)]) == 0
    assert main(["generate", "--from", str(picture), "--output", str(tmp_path / "b.png")]) == 0
    assert "identical" in capsys.readouterr().err
    assert np.array_equal(pixels(Image.open(picture)), pixels(Image.open(tmp_path / "b.png")))


def test_a_blend_of_such_adapters(
    kind: str, folder: Path, files: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    given = {"content": None, "style": None, "content_adapter": (files["content"],), "style_adapter": (files["style"],)}
    config = make_config(tmp_path / "out", model=str(folder), **given)
    loaded: LoadedModel = load_pipeline(folder)
    made: BlendResult = blend(config, loaded=loaded, progress=False)
    merged = read_adapter(made.merged)
    assert list(merged.companions) == list(ENCODERS[kind])
    painter = Painter(loaded, None, loaded.defaults)
    painter.attach("merged", made.merged)
    pictures = tmp_path / "out" / "pictures"
    difference = pixels(painter.paint(config.prompt or "", config.seed, {"merged": 1.0})).astype(int) - pixels(
        Image.open(pictures / "merged.png")
    )
    assert np.abs(difference).max() <= 1
