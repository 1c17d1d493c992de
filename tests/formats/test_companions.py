"""Adapters of text encoders in files: ours, and every spelling of other tools."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, LowRank, import_adapter, read_adapter, recognise, write_adapter, write_peft_folder
from tests.adapters_of_data import LINEAR, dense, made, relative, with_words
from tests.real_layers import assert_same_updates, real_adapter, save

WORDS = "text_model.encoder.layers.0.self_attn.q_proj"
KOHYA = "text_model_encoder_layers_0_self_attn_q_proj"


def factors(seed: int = 0, rank: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, rank, generator=generator), torch.randn(rank, 10, generator=generator)


def test_the_file_has_every_component_under_its_name(tmp_path: Path) -> None:
    adapter = with_words(0, "text_encoder", "text_encoder_2", trigger_words=["<c>"])
    path = adapter.save(tmp_path / "a.safetensors")
    assert {key.partition(".")[0] for key in load_file(path)} == {"transformer", "text_encoder", "text_encoder_2"}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {
        "format",
        "lora_adapter_metadata",
        "qrlora",
        "qrlora.text_encoder",
        "qrlora.text_encoder_2",
    }
    config = json.loads(metadata["lora_adapter_metadata"])
    # By the end of the path, which is the same in every version of transformers.
    assert config["text_encoder.target_modules"] == [WORDS.removeprefix("text_model.")]
    assert (config["text_encoder_2.r"], config["transformer.r"]) == (3, 3)
    again = read_adapter(path)
    assert [part.header for part in again.components.values()] == [p.header for p in adapter.components.values()]
    assert again.companions["text_encoder"].header is not None
    assert again.companions["text_encoder"].header.trigger_words == ["<c>"]
    for component, part in adapter.components.items():
        assert_same_updates(again.components[component], part.layers)


def test_layers_of_a_companion_may_differ_in_rank(tmp_path: Path) -> None:
    adapter = with_words(0, "text_encoder")
    pair = LowRank(*factors(rank=5))
    companion = adapter.companions["text_encoder"]
    more = replace(companion, layers={**companion.layers, WORDS.replace("q_proj", "k_proj"): pair}, header=None)
    path = replace(adapter, companions={"text_encoder": more}).save(tmp_path / "a.safetensors")
    assert_same_updates(read_adapter(path).companions["text_encoder"], more.layers)


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (f"text_encoder.{WORDS}.lora_B.weight", f"text_encoder.{WORDS}.lora_A.weight"),
        # As transformers 5 names the layers of a CLIPTextModel.
        tuple(f"text_encoder.{WORDS.removeprefix('text_model.')}.lora_{each}.weight" for each in "BA"),
        tuple(f"text_encoder.{WORDS}.lora_linear_layer.{each}.weight" for each in ("up", "down")),
        tuple(f"text_encoder.{WORDS.replace('q_proj', 'to_q_lora')}.{each}.weight" for each in ("up", "down")),
    ],
)
def test_spellings_of_diffusers(tmp_path: Path, up: str, down: str) -> None:
    B, A = factors()
    other = made().layers[LINEAR]
    tensors = {f"unet.{LINEAR}.lora_B.weight": other.B, f"unet.{LINEAR}.lora_A.weight": other.A, up: B, down: A}
    alpha = {f"{up.rpartition('.lora_')[0]}.alpha": torch.tensor(1.0)} if "lora_linear" in up else {}
    path = save({**tensors, **alpha}, tmp_path / "a.safetensors")
    adapter = read_adapter(path)
    scale = 0.5 if alpha else 1.0
    assert_same_updates(adapter.companions["text_encoder"], {WORDS: scale * B.double() @ A.double()})
    assert (adapter.component, list(adapter.layers), adapter.header) == ("unet", [LINEAR], None)
    found = recognise(path)
    assert (found.layout.name, found.unmatched) == ("diffusers", ())
    assert found.matched[up] == f"text_encoder.{WORDS}"


def test_years_old_files_of_diffusers_scripts(tmp_path: Path) -> None:
    """U-Net and text encoders both in the spelling from before peft."""
    B, A = factors()
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors = {
        f"unet.{layer}.processor.to_q_lora.up.weight": B,
        f"unet.{layer}.processor.to_q_lora.down.weight": A,
        f"text_encoder_2.{WORDS}.lora_linear_layer.up.weight": 2 * B,
        f"text_encoder_2.{WORDS}.lora_linear_layer.down.weight": A,
    }
    adapter = read_adapter(save(tensors, tmp_path / "a.safetensors"))
    assert_same_updates(adapter.alone(), {f"{layer}.to_q": B.double() @ A.double()})
    assert_same_updates(adapter.companions["text_encoder_2"], {WORDS: 2 * B.double() @ A.double()})


@pytest.mark.parametrize(
    "pattern", ["encoder.layers.0.self_attn.q_proj", rf"^{WORDS}", r"^encoder\.layers\.0\.self_attn\.q_proj"]
)
def test_alphas_by_pattern(tmp_path: Path, pattern: str) -> None:
    B, A = factors()
    other = made().layers[LINEAR]
    tensors = {"transformer.x.lora_B.weight": other.B, "transformer.x.lora_A.weight": other.A}
    tensors |= {f"text_encoder.{WORDS}.lora_B.weight": B, f"text_encoder.{WORDS}.lora_A.weight": A}
    config = {"transformer.r": 3, "transformer.lora_alpha": 3, "text_encoder.r": 2, "text_encoder.lora_alpha": 8}
    config |= {"text_encoder.alpha_pattern": {pattern: 6}}
    path = save(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    adapter = read_adapter(path)
    assert_same_updates(adapter.companions["text_encoder"], {WORDS: 3 * B.double() @ A.double()})
    assert_same_updates(adapter.alone(), {"x": other.delta().double()})


@pytest.mark.parametrize(
    ("stem", "component"),
    [
        (f"lora_te_{KOHYA}", "text_encoder"),
        (f"lora_te1_{KOHYA}", "text_encoder"),
        (f"lora_te2_{KOHYA}", "text_encoder_2"),
        (f"text_encoders.clip_l.transformer.{WORDS}", "text_encoder"),
        (f"text_encoders.clip_g.transformer.{WORDS}", "text_encoder_2"),
    ],
)
@pytest.mark.parametrize("denoiser", ["lora_unet_input_blocks_4_1_proj_in", "diffusion_model.input_blocks.4.1.proj_in"])
def test_spellings_of_kohya_and_comfyui(tmp_path: Path, stem: str, component: str, denoiser: str) -> None:
    B, A = factors()
    tensors = {
        f"{stem}.lora_up.weight": B,
        f"{stem}.lora_down.weight": A,
        f"{stem}.alpha": torch.tensor(1),  # whole numbers are integers in some files
        f"{denoiser}.lora_up.weight": B,
        f"{denoiser}.lora_down.weight": A,
    }
    path = save(tensors, tmp_path / "a.safetensors")
    # Kohya's own trainer never writes dots; such a mixture is read when it is said to be ComfyUI's.
    mixed = denoiser.startswith("lora_unet_") and "clip_" in stem
    adapter = import_adapter(path, layout="comfy" if mixed else None).adapter
    assert list(adapter.companions) == [component]
    assert_same_updates(adapter.companions[component], {WORDS: 0.5 * B.double() @ A.double()})
    assert_same_updates(adapter.alone(), {"down_blocks.1.attentions.0.proj_in": B.double() @ A.double()})


@pytest.mark.parametrize("format", ["kohya", "comfy"])
def test_written_for_other_tools_and_read_back(tmp_path: Path, format: str) -> None:
    words = with_words(0, "text_encoder", "text_encoder_2").companions
    adapter = replace(real_adapter("sdxl", "attn1.to_q"), companions=words)
    path = write_adapter(adapter, tmp_path / "a.safetensors", format)
    keys = set(load_file(path))
    assert {
        f"lora_te{n}_{KOHYA}.{each}" for n in (1, 2) for each in ("lora_up.weight", "lora_down.weight", "alpha")
    } <= keys
    found = recognise(path)
    assert (found.layout.name, found.unmatched) == (format, ())
    again = read_adapter(path)
    for component, part in adapter.components.items():
        assert_same_updates(again.components[component], part.layers)
        assert again.components[component].header == part.header


def test_a_header_that_is_not_the_files_own_is_ignored(tmp_path: Path) -> None:
    adapter = with_words(0, "text_encoder", rank=9)
    with pytest.warns(QrloraWarning, match="a qrlora header of rank 9 for text_encoder, which is not its own"):
        again = read_adapter(adapter.save(tmp_path / "a.safetensors"))
    assert again.companions["text_encoder"].header is None
    assert again.header == adapter.header


def test_where_companions_would_be_lost_nothing_is_written(tmp_path: Path) -> None:
    adapter = with_words(0, "text_encoder", "text_encoder_2")
    lost = "its adapter of text_encoder and text_encoder_2 would be lost"
    with pytest.raises(QrloraError, match=f"cannot be saved as coefficients only, since {lost}; save it whole"):
        adapter.save(tmp_path / "a.safetensors", coefficients_only=True)
    with pytest.raises(QrloraError, match=f"cannot be written as a peft folder, since {lost}"):
        write_peft_folder(adapter, tmp_path / "folder")
    gated = replace(adapter, own={LINEAR: {"gate_weight": torch.ones(2, 10)}})
    with pytest.raises(QrloraError, match=f"since {lost}"):
        write_adapter(gated, tmp_path / "a.safetensors", "own")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"text_encoder.{WORDS}.lora_A.weight": torch.ones(2, 10)}, rf"{WORDS}\.lora_B\.weight is missing"),
        (
            {
                f"text_encoder.{WORDS}.lora_A.weight": torch.ones(2, 10),
                f"text_encoder.{WORDS.removeprefix('text_model.')}.lora_A.weight": torch.ones(2, 10),
            },
            "is there twice, in two spellings",
        ),
        (
            {
                f"text_encoder.{WORDS}.lora_A.weight": torch.full((2, 10), float("nan")),
                f"text_encoder.{WORDS}.lora_B.weight": torch.ones(6, 2),
            },
            rf"{WORDS}\.lora_A\.weight has values that are not finite",
        ),
        ({f"text_encoder.{WORDS}.lora_magnitude_vector": torch.ones(6)}, "uses DoRA"),
        ({f"text_encoder_3.{WORDS}.lora_A.weight": torch.ones(2, 10)}, "text_encoder_3"),
        (
            {"text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": torch.ones(2, 10)},
            "1 of them of text",
        ),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    pair = made().layers[LINEAR]
    denoiser = {"transformer.x.lora_B.weight": pair.B, "transformer.x.lora_A.weight": pair.A}
    path = save({**denoiser, **tensors}, tmp_path / "a.safetensors")
    with pytest.raises(QrloraError, match=message):
        read_adapter(path)


def test_what_cannot_be_a_companion() -> None:
    words = with_words(0, "text_encoder").companions["text_encoder"]
    for companions in (
        {"text_encoder_2": words},
        {"unet": made()},
        {"text_encoder": replace(words, companions={"text_encoder_2": replace(words, component="text_encoder_2")})},
        {"text_encoder": replace(words, own={WORDS: {"x": torch.ones(1)}})},
    ):
        with pytest.raises(QrloraError, match=r"the adapter.* adapter of "):
            replace(made(), companions=companions)
    with pytest.raises(QrloraError, match="cannot have an adapter of text_encoder beside that of text_encoder"):
        Adapter(words.layers, component="text_encoder", companions={"text_encoder": words})
    assert relative(dense(words.scaled(2.0), WORDS), 2 * dense(words, WORDS)) < 1e-6
