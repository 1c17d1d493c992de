"""Quantised bases, streamed blocks and `memory` presets in training: exact to resume, and the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qrlora.blend import BlendConfig, blend
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, read_adapter
from qrlora.models import LoadedModel, load_pipeline, read_blueprint, shipped_models
from qrlora.training import TrainConfig, TrainResult, load_for, train
from qrlora.training.config import Memory
from qrlora.training.memory import GIB, MEMORY_FIELDS, PRESETS, parameters_of, preset
from tests.training.conftest import MakeConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*torch:DeprecationWarning")
KINDS = ["nf4", "int8"]


def run(config: TrainConfig, **more: Any) -> tuple[TrainResult, Adapter]:
    result = train(config, progress=False, **more)
    return result, read_adapter(result.path)


def assert_same(one: Adapter, other: Adapter) -> None:
    assert one.layers.keys() == other.layers.keys()
    for name, pair in one.layers.items():
        assert torch.equal(pair.A, other.layers[name].A), name
        assert torch.equal(pair.B, other.layers[name].B), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_trains_and_resumes_exactly_also_with_its_blocks_on_the_cpu(
    make_config: MakeConfig, tmp_path: Path, kind: str
) -> None:
    whole, expected = run(make_config(max_train_steps=4, quantization=kind))
    assert len(set(whole.losses)) == 4
    header = expected.header
    assert header is not None
    packed = "packed-bitsandbytes.nf4" if kind == "nf4" else "packed-torchao.int8"
    assert all(value.startswith(packed) for value in header.weight_hashes.values())
    second = {"output_dir": str(tmp_path / "second"), "quantization": kind, "checkpointing_steps": 2}
    run(make_config(max_train_steps=2, **second))
    # Where memory is, is not part of what a run is.
    (tmp_path / "second" / "adapter.safetensors").unlink()
    offloaded = {"offload": "blocks", "encoder_offload": "blocks", "gradient_checkpointing": True}
    resumed, found = run(make_config(max_train_steps=4, resume="latest", **second, **offloaded))
    assert resumed.losses == whole.losses
    assert_same(found, expected)
    with pytest.raises(QrloraError, match=r"cannot resume.*quantization differs"):
        run(make_config(max_train_steps=5, resume="latest", **second | {"quantization": None}))


@pytest.mark.parametrize("form", [{"adapter.basis": "lora"}, {"adapter.side": "input"}, {"adapter.basis": "dora"}])
def test_streamed_blocks_change_no_bit_of_any_adapter(
    make_config: MakeConfig, tmp_path: Path, form: dict[str, Any]
) -> None:
    more = {"max_train_steps": 3, "gradient_accumulation_steps": 2, "mixed_precision": "bf16", **form}
    whole, expected = run(make_config(**more))
    streamed, found = run(make_config(**more, offload="blocks", output_dir=str(tmp_path / "streamed")))
    assert streamed.losses == whole.losses
    assert_same(found, expected)


def test_validation_pictures_are_made_with_streamed_blocks(make_config: MakeConfig, tmp_path: Path) -> None:
    more = {"max_train_steps": 2, "validation_prompt": "a cat", "validation_steps": 1}
    pictures = []
    for name, offload in (("whole", "none"), ("streamed", "blocks")):
        run(make_config(**more, offload=offload, output_dir=str(tmp_path / name)))
        pictures.append([path.read_bytes()[-2000:] for path in sorted((tmp_path / name).glob("validation/*.png"))])
    assert len(pictures[0]) == 2
    assert pictures[0] == pictures[1]


def test_the_denoiser_is_read_after_the_encoders_are_gone(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = LoadedModel.load_denoiser

    def load_denoiser(self: LoadedModel, device: Any) -> None:
        pipeline = self.pipeline
        seen.append((pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae, self.denoiser.device.type))
        original(self, device)

    monkeypatch.setattr(LoadedModel, "load_denoiser", load_denoiser)
    run(make_config(max_train_steps=1))
    assert seen == [(None, None, None, "meta")]


def test_memory_resolves_to_plain_settings_and_what_is_given_wins(make_config: MakeConfig, tmp_path: Path) -> None:
    for memory in GIB:
        out = tmp_path / memory
        result, _ = run(make_config(max_train_steps=2, memory=memory, output_dir=str(out)))
        written = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
        smallest = dict(PRESETS[min(PRESETS)][memory])
        assert {name: written[name] for name in MEMORY_FIELDS} == smallest
        assert {name: getattr(result.config, name) for name in MEMORY_FIELDS} == smallest
        assert written["memory"] == memory
        # The file alone gives the same settings, whatever a preset may mean in a later version.
        assert TrainConfig.from_yaml(out / "config.yaml").model_fields_set >= set(MEMORY_FIELDS)
    result, _ = run(make_config(max_train_steps=1, memory="6gb", quantization="nf4", output_dir=str(tmp_path / "own")))
    assert result.config.quantization == "nf4"
    assert result.config.encoder_offload == "blocks"


def test_presets_are_by_the_size_of_the_model() -> None:
    expected: dict[str, dict[Memory, str | None]] = {
        "flux-dev": {"6gb": "nf4", "12gb": "nf4", "24gb": "int8", "max": None},
        "sd3.5-large": {"6gb": "nf4", "12gb": "int8", "24gb": None, "max": None},
        "sdxl": {"6gb": "int8", "12gb": None, "24gb": None, "max": None},
    }
    for model, rows in expected.items():
        denoiser = read_blueprint(model).denoiser
        for memory, quantization in rows.items():
            assert preset(memory, denoiser)["quantization"] == quantization, (model, memory)
    for model in shipped_models():
        denoiser = read_blueprint(model).denoiser
        offloads = [preset(memory, denoiser)["offload"] for memory in GIB]
        assert offloads == sorted(offloads)  # "blocks" on the smallest cards alone
        assert "blocks" not in offloads[{"qwen-image": 3, "flux2-dev": 5}.get(model, 2) :]


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_size_of_a_denoiser_is_that_of_its_weights_however_packed(tiny_flux: Path, kind: Any) -> None:
    plain = load_pipeline(tiny_flux).denoiser
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert parameters_of(load_pipeline(tiny_flux, quantization=kind).denoiser) == count


def test_a_model_that_is_there_stays_as_it_was_loaded(make_config: MakeConfig, tiny_flux: Path) -> None:
    model = load_pipeline(tiny_flux, quantization="nf4", offload="blocks", encoder_offload="blocks")
    result, adapter = run(make_config(max_train_steps=2), loaded=model)
    assert (result.config.quantization, result.config.offload) == ("nf4", "blocks")
    again, same = run(make_config(max_train_steps=2, overwrite=True), loaded=model)
    assert again.losses == result.losses
    assert_same(same, adapter)
    with pytest.raises(QrloraError, match="quantization=int8 is asked for, but the model is loaded already"):
        run(make_config(quantization="int8", overwrite=True), loaded=model)
    with pytest.raises(QrloraError, match=r"asked for \(memory: 6gb\), but the model is loaded already"):
        run(make_config(memory="6gb", overwrite=True), loaded=load_pipeline(tiny_flux))


def test_a_blend_on_a_small_card_is_the_blend_of_the_quantised_base(
    tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = {
        most: {**rows, "6gb": {**rows["6gb"], "offload": "blocks", "gradient_checkpointing": True}}
        for most, rows in PRESETS.items()
    }
    sheets = []
    for name, presets in (("plain", PRESETS), ("streamed", streamed)):
        monkeypatch.setattr("qrlora.training.memory.PRESETS", presets)
        config = BlendConfig(
            content=pictures / "a.png",
            content_prompt="a <c> dog",
            style=pictures / "c.png",
            style_prompt="in <s> style",
            prompt="a <c> dog in <s> style",
            model=str(tiny_flux),
            memory="6gb",
            output=tmp_path / name,
            max_train_steps=2,
            rank=2,
            content_weights=(0.0, 1.0),
            style_weights=(1.0,),
        )
        result = blend(config, progress=False)
        written = yaml.safe_load((tmp_path / name / "train" / "content" / "config.yaml").read_text(encoding="utf-8"))
        assert written["quantization"] == "int8"
        assert written["offload"] == ("blocks" if name == "streamed" else "none")
        sheets.append(read_adapter(result.merged))
    assert_same(*sheets)


def test_a_whole_model_is_loaded_by_memory(tiny_flux: Path) -> None:
    model = load_for("6gb", tiny_flux, dtype=torch.float32, device="cpu")
    assert (model.quantization, model.encoder_offload) == ("int8", "blocks")
    assert load_for(None, tiny_flux, dtype=torch.float32, device="cpu").quantization is None
