"""Adapters that act within ranges of timesteps: pictures, their provenance, and a blend of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from qrlora.adapter import AdapterSpec, add_adapter, remove_adapter, save_adapter, trainable_parameters
from qrlora.blend import BlendConfig, Painter, blend, read_provenance
from qrlora.blend.provenance import SheetProvenance, read_chunk
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.models import LoadedModel, load_pipeline
from tests.blend.conftest import MakeConfig

PROMPT, SEED = "a <c> dog", 3
WEIGHTS = {"content": 0.9, "style": 0.7}


@pytest.fixture(params=["tiny_flux", "tiny_sd3", "tiny_sdxl", "tiny_qwen_image", "tiny_z_image"])
def painter(request: pytest.FixtureRequest, tmp_path: Path) -> Painter:
    """A tiny pipeline at six steps with two adapters that change much."""
    model = load_pipeline(request.getfixturevalue(request.param))
    made = Painter(model, None, model.defaults.model_copy(update={"num_inference_steps": 6}))
    for seed, name in enumerate(WEIGHTS):
        add_adapter(model.denoiser, AdapterSpec(rank=4, basis="lora"), name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable_parameters(model.denoiser, name).values():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        save_adapter(model.denoiser, name, tmp_path / f"{name}.safetensors")
        remove_adapter(model.denoiser, name)
        made.attach(name, tmp_path / f"{name}.safetensors")
    return made


def _stock(painter: Painter, at_step: Any) -> Image.Image:
    """The stock pipeline's own picture; `at_step(timestep)` is called before each of its steps but the first."""
    model, settings = painter.loaded, painter.settings
    arguments: dict[str, Any] = {name: getattr(settings, name) for name in model.family.generation_arguments}

    def callback(pipeline: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
        following = pipeline.scheduler.timesteps[step + 1 :]
        if len(following):
            at_step(float(following[0]))
        return {}

    return model.pipeline(
        PROMPT,
        # These guide against a text alone, SDXL against zeros where there is none.
        negative_prompt="" if model.family.guided_by == "true_cfg_scale" else None,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=callback,
        **arguments,
    ).images[0]


def _same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is None


def test_a_range_is_switched_by_step(painter: Painter) -> None:
    """Against the stock pipeline, whose callback sets diffusers' own adapters for the next step."""
    denoiser, timesteps = painter.loaded.denoiser, list[float]()
    denoiser.disable_adapters()
    painter.loaded.pipeline.set_progress_bar_config(disable=True)
    _stock(painter, timesteps.append)
    ordered = sorted(timesteps)
    # From one step's timestep to another's, so that bounds that are met count as within.
    ranges = {"content": (ordered[-2], 1000.0), "style": (ordered[1], ordered[-2])}

    def by_hand(timestep: float) -> None:
        acting = [name for name, (low, high) in ranges.items() if low <= timestep <= high]
        acted.append(len(acting))
        denoiser.disable_adapters()
        if acting:
            denoiser.enable_adapters()
            denoiser.set_adapters(acting, [WEIGHTS[name] for name in acting])

    acted: list[int] = []
    by_hand(1000.0)
    expected = _stock(painter, by_hand)
    assert acted == [1, 1, 2, 1, 1, 0]
    denoiser.enable_adapters()
    found = painter.paint(PROMPT, SEED, WEIGHTS, ranges).image
    assert _same(found, expected)
    assert not _same(found, painter.paint(PROMPT, SEED, WEIGHTS).image)


def test_all_steps_are_as_without_a_range_and_none_are_the_base(painter: Painter) -> None:
    both, base = painter.paint(PROMPT, SEED, WEIGHTS), painter.paint(PROMPT, SEED, {})
    every = painter.paint(PROMPT, SEED, WEIGHTS, {"content": (0.0, 1000.0), "style": (0.0, 1000.0)})
    assert every == both  # the same picture, not only an equal one
    covering = painter.paint(PROMPT, SEED, WEIGHTS, {"content": (0.5, 1000.0), "style": (0.0, 999.9999)})
    assert covering is not both
    only = painter.paint(PROMPT, SEED, {"content": 0.9}, {"content": (0.5, 1000.0)})
    assert _same(only.image, painter.paint(PROMPT, SEED, {"content": 0.9}).image)
    assert not _same(both.image, base.image)
    none = painter.paint(PROMPT, SEED, WEIGHTS, {"content": (0.1, 0.2), "style": (0.1, 0.1)})
    assert _same(none.image, base.image)
    left_out = painter.paint(PROMPT, SEED, {"content": 0.0, "style": 0.7}, {"content": (0.0, 500.0)})
    assert _same(left_out.image, painter.paint(PROMPT, SEED, {"style": 0.7}).image)
    assert _same(painter.paint("other", SEED, WEIGHTS).image, painter.paint("other", SEED, WEIGHTS).image)


def test_the_picture_knows_its_ranges(painter: Painter, tmp_path: Path) -> None:
    picture = painter.paint(PROMPT, SEED, WEIGHTS, {"content": (500.0, 1000.0)})
    story = read_provenance(painter.save(picture, tmp_path / "x.png"))
    assert [(use.file, use.weight, use.timesteps) for use in story.adapters] == [
        ("content.safetensors", 0.9, (500.0, 1000.0)),
        ("style.safetensors", 0.7, None),
    ]
    with pytest.raises(QrloraError, match=r"content\.safetensors: 700 to 300 is no range of timesteps"):
        painter.paint(PROMPT, SEED, WEIGHTS, {"content": (700.0, 300.0)})


def test_a_blend_trains_and_draws_within_ranges(
    make_config: MakeConfig, model: LoadedModel, tmp_path: Path, pictures: Path
) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("min_timestep: 100\n")
    config = make_config(
        tmp_path / "out",
        content_timesteps=(500, 1000),
        style_timesteps=(0, 700),
        style_config=more,
        num_inference_steps=6,
        sweep_steps=2,
    )
    with pytest.warns(
        QrloraWarning,
        match=r"merged\.safetensors acts at all timesteps, since .* --adapter \S*content\.safetensors=1@500-1000 "
        r"--adapter \S*style\.safetensors=1@0-700\.",
    ):
        made = blend(config, loaded=model, progress=False)
    report = json.loads(made.report.read_text())
    assert report["timesteps"] == {"content": [500, 1000], "style": [0, 700]}
    assert report["adapters"]["merged"]["source"].endswith("acts at all timesteps")
    ranges = {role: report["adapters"][role]["training"] for role in ("content", "style")}
    assert (ranges["content"]["min_timestep"], ranges["content"]["max_timestep"]) == (500, 1000)
    assert (ranges["style"]["min_timestep"], ranges["style"]["max_timestep"]) == (100, 1000)  # its own file's word

    def timesteps(path: Path) -> list[Any]:
        chunk = read_chunk(path)
        assert not hasattr(chunk, "step")
        return [use.timesteps for use in chunk.adapters]  # type: ignore[union-attr]

    folder = tmp_path / "out" / "pictures"
    both = [(500, 1000), (0, 700)]
    for name in ("merge-1-1", "merge-1-0.5", "sweep-merge-2-0.75"):
        assert timesteps(folder / f"{name}.png") == both
    assert timesteps(folder / "content.png") == both[:1]
    assert timesteps(folder / "sweep-style-end-1.png") == both[1:]
    assert timesteps(made.sheet) == both
    assert made.sweep is not None
    assert timesteps(made.sweep) == both * 2
    assert isinstance(read_chunk(made.sheet), SheetProvenance)
    # The merged file's picture is what the merged file makes.
    assert timesteps(folder / "merged.png") == [None, None]
    painter = Painter(model, None, model.defaults.model_copy(update={"num_inference_steps": 6}))
    painter.attach("merged", made.merged)
    try:
        drawn = painter.paint(config.prompt or "", config.seed, {"merged": 1.0}).image
    finally:
        painter.detach("merged")
    shown = Image.open(folder / "merged.png").convert("RGB")
    assert max(high for _, high in ImageChops.difference(drawn, shown).getextrema()) <= 1
    assert not _same(shown, Image.open(folder / "merge-1-1.png"))


@pytest.mark.parametrize("bounds", [(500, 500), (700, 300), (-1, 5), (0, 1001), (float("nan"), 5)])
def test_a_range_that_is_none_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(QrloraError, match=r"--style-timesteps .* is no range of timesteps; give two numbers"):
        BlendConfig(style_timesteps=bounds)
