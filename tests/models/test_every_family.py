"""What every family must do, from an ordinary pipeline folder on: train, resume, generate, load elsewhere, merge."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qrlora.adapter import adapters_disabled, attach_adapter, remove_adapter, set_adapters
from qrlora.formats import read_adapter
from qrlora.merging import merge
from qrlora.models import LoadedModel, load_pipeline
from qrlora.training import TrainConfig, train
from tests.tiny_newer import save_flux2, save_flux2_klein, save_qwen_image, save_sd15, save_z_image
from tests.tiny_pipelines import save_flux, save_sd3, save_sdxl

# peft warns whenever a second adapter is loaded; every other warning is an error.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
KINDS: dict[str, Callable[[Path], Path]] = {
    "flux-dev": lambda folder: save_flux(folder, guidance_embeds=True),
    "flux-schnell": save_flux,
    "sd3": save_sd3,
    "sd3.5-medium": lambda folder: save_sd3(folder, dual_attention=True),
    "sd3-without-t5": lambda folder: save_sd3(folder, t5=False),
    "sdxl": save_sdxl,
    "sdxl-v": lambda folder: save_sdxl(folder, prediction="v_prediction", zero_snr=True),
    "sd15": save_sd15,
    "flux2-dev": save_flux2,
    "flux2-klein": save_flux2_klein,
    "qwen-image": save_qwen_image,
    "z-image": save_z_image,
}
PROMPT = "a <c> dog in <s> style"
WEIGHTS = {"content": 0.9, "style": 1.0}


@dataclass
class Case:
    """A model, and two adapters of five steps each on it."""

    folder: Path
    model: LoadedModel
    outputs: dict[str, Path]
    losses: dict[str, list[float]]

    @property
    def files(self) -> dict[str, Path]:
        return {role: output / "adapter.safetensors" for role, output in self.outputs.items()}

    def config(self, role: str, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "instance_data_dir": str(self.folder.parent / f"{role}.png"),
            "instance_prompt": {"content": "a <c> dog", "style": "a cat in <s> style"}[role],
            "output_dir": str(self.outputs[role]),
            "max_train_steps": 5,
            "train_batch_size": 2,
            "learning_rate": 0.05,
            "checkpointing_steps": 2,
            "seed": {"content": 0, "style": 1}[role],
        }
        return TrainConfig.parse(values | changes)


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    above = tmp_path_factory.mktemp(str(request.param))
    folder = KINDS[request.param](above / "model")
    generator = np.random.default_rng(0)
    for role in WEIGHTS:
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), np.uint8)).save(above / f"{role}.png")
    made = Case(folder, load_pipeline(folder), {role: above / role for role in WEIGHTS}, {})
    for role in WEIGHTS:
        made.losses[role] = train(made.config(role), loaded=made.model, progress=False).losses
    return made


@pytest.fixture
def attached(case: Case) -> Iterator[Any]:
    """The case's denoiser with both adapters on it."""
    for role, path in case.files.items():
        attach_adapter(case.model.denoiser, read_adapter(path), role)
    yield case.model.denoiser
    for role in case.files:
        remove_adapter(case.model.denoiser, role)


def stock_pipeline(case: Case) -> Any:
    """By diffusers alone."""
    left_out = {} if case.model.pipeline.components.get("text_encoder_3", True) else {"tokenizer_3": None}
    if left_out:
        left_out["text_encoder_3"] = None
    pipeline = type(case.model.pipeline).from_pretrained(case.folder, local_files_only=True, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(case: Case, pipeline: Any) -> Tensor:
    """By the stock call, with guidance where it has any."""
    family, settings = case.model.family, case.model.defaults
    assert family.uses_negative(settings) == (family.name != "flux2")
    generator = torch.Generator().manual_seed(3)
    arguments: dict[str, Any] = {name: getattr(settings, name) for name in family.generation_arguments}
    if "negative_prompt" in inspect.signature(type(pipeline).__call__).parameters:  # klein's is always empty
        arguments["negative_prompt"] = "a cat"
    return pipeline(prompt=PROMPT, generator=generator, output_type="latent", **arguments).images


def pixels_of(case: Case) -> np.ndarray:
    pictures = case.model.family.generate(case.model.pipeline, [PROMPT], seeds=[3], **case.model.defaults.model_dump())
    return np.asarray(pictures[0])


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one.double() - other.double()).norm() / other.double().norm()) < tolerance


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(case: Case, tmp_path: Path) -> None:
    start = case.outputs["content"] / "checkpoint-2"
    config = case.config("content", resume=str(start), output_dir=str(tmp_path), model=str(case.folder))
    result = train(config, progress=False)  # on a model loaded anew
    assert result.path.read_bytes() == case.files["content"].read_bytes()
    assert result.losses == case.losses["content"]
    assert len(result.losses) == 5


def test_bf16_trains_fp32_coefficients_and_draws(case: Case, tmp_path: Path) -> None:
    config = case.config(
        "content",
        output_dir=str(tmp_path),
        model=str(case.folder),
        mixed_precision="bf16",
        max_train_steps=2,
        gradient_checkpointing=True,
        validation_prompt=PROMPT,
    )
    result = train(config, progress=False)
    pair = next(iter(read_adapter(result.path).layers.values()))
    assert not torch.equal(pair.A, pair.A.bfloat16().float())
    # the same draws, so the same loss but for the rounding of the base and of what it computes
    assert result.losses[0] == pytest.approx(case.losses["content"][0], rel=0.05)
    assert (tmp_path / "validation" / "step-000002-0.png").is_file()


def test_training_tells_pictures_and_captions_apart(case: Case) -> None:
    first, second = (read_adapter(path) for path in case.files.values())
    still = {name for name, pair in first.layers.items() if not pair.A.any()}
    # The text that SD3's last block gives out is thrown away, so nothing depends on what that text asks for.
    assert still == ({"transformer_blocks.2.attn.add_q_proj"} if case.model.family.name == "sd3" else set())
    assert all(
        not torch.equal(pair.A, second.layers[name].A) for name, pair in first.layers.items() if name not in still
    )


def test_pictures_have_the_adapters_in_them(case: Case, attached: Any) -> None:
    set_adapters(attached, {"content": 1.0})
    with_adapter = pixels_of(case)
    with adapters_disabled(attached):
        base = pixels_of(case)
    assert base.shape == (32, 32, 3)
    assert (with_adapter != base).any()
    np.testing.assert_array_equal(base, pixels_of(Case(case.folder, load_pipeline(case.folder), {}, {})))


def test_streamed_blocks_and_encoders_change_no_pixel(case: Case) -> None:
    streamed = load_pipeline(case.folder, offload="blocks", encoder_offload="blocks")
    np.testing.assert_array_equal(pixels_of(Case(case.folder, streamed, {}, {})), pixels_of(case))


def test_stock_diffusers_draws_the_same_with_our_files(case: Case, attached: Any) -> None:
    stock = stock_pipeline(case)
    base = latents_of(case, stock)
    for role, path in case.files.items():
        stock.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=role)
    for weights in ({"content": 1.0}, WEIGHTS):
        set_adapters(attached, weights)
        stock.set_adapters(list(weights), list(weights.values()))
        ours = latents_of(case, case.model.pipeline)
        assert close(latents_of(case, stock), ours)
        assert not close(ours, base, 1e-3)


def test_the_cards_recipe_draws_the_same(case: Case, attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python in the model card, by stock diffusers alone."""
    folder = case.outputs["content"]
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    code = re.sub(r"from_pretrained\('[^']*'", f"from_pretrained({str(case.folder)!r}", found[1])
    code = code.replace(").images", ", generator=torch.Generator().manual_seed(3)).images")
    monkeypatch.chdir(folder)
    exec(code, {})
    set_adapters(attached, {"content": 1.0})
    settings = case.model.defaults.model_dump()
    (ours,) = case.model.family.generate(case.model.pipeline, ["a <c> dog"], seeds=[3], **settings)
    with Image.open("picture.png") as theirs:
        assert np.abs(np.asarray(theirs.convert("RGB")).astype(int) - np.asarray(ours)).max() <= 1


def test_the_merged_file_is_both_at_their_weights(case: Case, attached: Any, tmp_path: Path) -> None:
    parts = [read_adapter(path) for path in case.files.values()]
    merged = merge(parts, list(WEIGHTS.values()), "sum")
    for name, pair in merged.layers.items():
        factors = [(part.layers[name].B.double(), part.layers[name].A.double()) for part in parts]
        total = sum(weight * (B @ A) for weight, (B, A) in zip(WEIGHTS.values(), factors, strict=True))
        torch.testing.assert_close(pair.B.double() @ pair.A.double(), total, rtol=1e-5, atol=1e-7)
    path = merged.save(tmp_path / "merged.safetensors")
    stock = stock_pipeline(case)
    stock.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="merged")
    set_adapters(attached, WEIGHTS)
    assert close(latents_of(case, stock), latents_of(case, case.model.pipeline))
