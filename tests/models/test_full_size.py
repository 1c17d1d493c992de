"""The full-size public models on the meta device: layers, shapes and numbers, against their published sizes."""

import json
from pathlib import Path

import pytest
from torch import nn

from qrlora.adapter import AdapterSpec, add_blank_adapter, target_layers
from qrlora.errors import QrloraError
from qrlora.models import read_blueprint, shipped_models

RANK = 64
# Adapted layers; parameters of the denoiser and of its text encoders as their publishers state them (in billions).
KNOWN = {
    "flux-dev": (342, 11.90, 4.885),
    "flux-schnell": (342, 11.89, 4.885),
    "sd3-medium": (191, 2.03, 5.58),
    "sd3.5-medium": (191, 2.24, 5.58),
    "sd3.5-large": (303, 8.06, 5.58),
    "sdxl": (560, 2.57, 0.82),
    "sd15": (128, 0.86, 0.123),
    "flux2-dev": (144, 32.22, 24.01),
    "flux2-klein-4b": (80, 3.88, 4.02),
    "flux2-klein-9b": (120, 9.08, 8.19),
    "qwen-image": (478, 20.43, 8.29),
    "z-image": (136, 6.15, 4.02),
}
# Millions of the autoencoder's: most have one of the same size.
AUTOENCODERS = {"flux2-dev": 84.0, "flux2-klein-4b": 84.0, "flux2-klein-9b": 84.0, "qwen-image": 126.9}
# Inputs of the adapted layers in units of the denoiser's width, counted by hand: eight projections of joint attention
# and feed-forwards of three widths (gated) in a double block of FLUX.2, one fused layer in a single block; eight
# projections in Qwen-Image's blocks, less two in the last; four in each of Z-Image's 30 + 2 + 2.
INPUTS = {
    "flux2-dev": (6144, 8 * (8 + 2 * (1 + 3)) + 48),
    "flux2-klein-4b": (3072, 5 * (8 + 2 * (1 + 3)) + 20),
    "flux2-klein-9b": (4096, 8 * (8 + 2 * (1 + 3)) + 24),
    "qwen-image": (3072, 60 * 8 - 2),
    "z-image": (3840, 34 * 4),
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in module.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("model", KNOWN)
def test_layers_and_sizes(model: str) -> None:
    layers, billions, text = KNOWN[model]
    blueprint = read_blueprint(model)
    denoiser = blueprint.denoiser
    assert all(parameter.is_meta for parameter in denoiser.parameters())
    assert count(denoiser) / 1e9 == pytest.approx(billions, abs=0.005)
    encoders = sum(count(blueprint.build(name)) for name in blueprint.family.text_components)
    assert encoders / 1e9 == pytest.approx(text, abs=0.005)
    assert count(blueprint.build("vae")) / 1e6 == pytest.approx(AUTOENCODERS.get(model, 83.7), abs=0.2)
    shapes = {name: denoiser.get_submodule(name).weight.shape for name in target_layers(denoiser, "auto")}
    trained = add_blank_adapter(denoiser, AdapterSpec(rank=RANK), "content")
    assert len(trained) == layers
    # Q is [out, r] and dR [r, in], of which the upper triangle is trained.
    for name, (_, inputs) in shapes.items():
        assert trained[name] == RANK * inputs - RANK * (RANK - 1) // 2
        layer = denoiser.get_submodule(name)
        assert layer.lora_A["content"].weight.shape == (RANK, inputs)
        assert layer.lora_B["content"].weight.shape == (shapes[name][0], RANK)


@pytest.mark.parametrize("model", INPUTS)
def test_trained_numbers_by_hand(model: str) -> None:
    width, inputs = INPUTS[model]
    trained = add_blank_adapter(read_blueprint(model).denoiser, AdapterSpec(rank=RANK), "content")
    assert sum(trained.values()) == RANK * width * inputs - len(trained) * RANK * (RANK - 1) // 2


def test_the_published_numbers_of_flux() -> None:
    blueprint = read_blueprint("flux-dev")
    for mask, millions in (("full", 89.65), ("upper", 88.96)):
        trained = add_blank_adapter(blueprint.denoiser, AdapterSpec(rank=RANK, mask=mask), "content")
        assert sum(trained.values()) / 1e6 == pytest.approx(millions, abs=0.005)
    plain = add_blank_adapter(blueprint.denoiser, AdapterSpec(rank=RANK, basis="lora"), "content")
    assert sum(plain.values()) / 1e6 == pytest.approx(179.3, abs=0.05)


def test_the_committed_table_is_this_table() -> None:
    results = json.loads(Path("benchmarks/results/memory.json").read_text(encoding="utf-8"))
    assert set(results["layers"]) == set(shipped_models()) == set(KNOWN)
    for model, row in results["layers"].items():
        denoiser = read_blueprint(model).denoiser
        trained = add_blank_adapter(denoiser, AdapterSpec(rank=results["rank"]), "content")
        assert (row["layers"], row["upper"], row["parameters"]) == (
            len(trained),
            sum(trained.values()),
            count(denoiser),
        )


def test_a_folder_is_read_like_a_shipped_configuration(tiny_flux: Path) -> None:
    blueprint = read_blueprint(tiny_flux)
    assert blueprint.model_id == "tiny-flux"
    assert blueprint.family.name == "flux"
    assert blueprint.vae_scale_factor == 8
    assert blueprint.training["rank"] == 4
    assert set(blueprint.components) == {"transformer", "text_encoder", "text_encoder_2", "vae"}


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match=r"no model_index\.json\. Known without files are flux-dev"):
        read_blueprint(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(QrloraError, match="PixArtAlphaPipeline, which belongs to no model family"):
        read_blueprint(tmp_path)
    with pytest.raises(QrloraError, match="a dora adapter needs is not known before"):
        add_blank_adapter(read_blueprint("sd3-medium").denoiser, AdapterSpec(basis="dora"), "content")
    with pytest.raises(QrloraError, match="rank of at most 1536, not 5000"):
        add_blank_adapter(read_blueprint("sd3-medium").denoiser, AdapterSpec(rank=5000), "content")
