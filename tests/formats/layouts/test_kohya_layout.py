"""kohya's files: written, read back, and read by diffusers' own loaders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline, FluxPipeline, QwenImagePipeline, StableDiffusionXLPipeline, ZImagePipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qrlora.adapter import attach_adapter
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, LowRank, import_adapter, read_adapter, write_adapter
from tests.adapters_of_data import orthonormal
from tests.real_layers import MODELS, assert_same_updates, dense64, random_pair, real_adapter, save, tiny_sdxl
from tests.tiny_models import flux_inputs, inputs, output, tiny, tiny_flux

PUBLISHED = ("attn.to_q", "attn.to_k", "attn.to_v", "to_out.0", "add_q_proj", "ff.net.0.proj", "ff.net.2", "to_add_out")


@settings(max_examples=12, deadline=None)
@given(kind=st.sampled_from(sorted(MODELS)), rank=st.integers(1, 5), seed=st.integers(0, 99))
@pytest.mark.parametrize("format", ["kohya", "comfy"])
def test_every_layer_there_and_back(
    tmp_path_factory: pytest.TempPathFactory, format: str, kind: str, rank: int, seed: int
) -> None:
    ends = PUBLISHED if seed % 2 and kind in ("flux", "sd3", "sdxl") else ()
    adapter = real_adapter(kind, *ends, rank=rank, seed=seed)
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    imported = import_adapter(write_adapter(adapter, path, format))
    assert_same_updates(imported.adapter, adapter.layers)
    assert imported.adapter.component == adapter.component
    assert imported.recognised.layout.name == format
    assert imported.recognised.unmatched == ()
    assert {pair.rank for pair in imported.adapter.layers.values()} == {rank}


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("format", ["kohya", "comfy"])
def test_bases_and_header_come_back_to_the_last_bit(tmp_path: Path, format: str, side: str) -> None:
    from qrlora.formats import Header

    generator = torch.Generator().manual_seed(0)
    layers: dict[str, LowRank] = {}
    for path, pair in real_adapter("flux", *PUBLISHED, rank=3).layers.items():
        frozen = orthonormal(pair.shape[0 if side == "output" else 1], 3, len(layers))
        trained = torch.randn(3, pair.shape[1 if side == "output" else 0], generator=generator)
        layers[path] = LowRank(frozen, trained) if side == "output" else LowRank(trained.T.contiguous(), frozen.T)
    header = Header.model_validate({"basis": "qr", "side": side, "rank": 3, "trigger_words": ["<c>"]})
    back = read_adapter(write_adapter(Adapter(layers, header), tmp_path / "a.safetensors", format))
    assert back.header == header
    for path, pair in layers.items():
        assert torch.equal(back.layers[path].B, pair.B)
        assert torch.equal(back.layers[path].A, pair.A)


def test_names_ranks_and_alphas_are_kohyas(tmp_path: Path) -> None:
    adapter = real_adapter("flux", "attn.to_q", "attn.to_k", "attn.to_v", "ff.net.2", rank=2)
    path = write_adapter(adapter, tmp_path / "a.safetensors", "kohya", save_dtype="bf16")
    tensors = load_file(path)
    assert len(tensors) == 3 * 6
    single = tensors["lora_unet_single_blocks_1_linear1.lora_up.weight"]
    assert single.shape == (7 * 32, 4 * 2)
    assert not single[96:].any()  # no feed-forward was adapted
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (6, 32)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 6
    assert tensors["lora_unet_double_blocks_1_img_mlp_2.lora_down.weight"].dtype == torch.bfloat16
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora_flux"
        assert file.metadata()["ss_network_dim"] == "8"


def test_alpha_and_a_fused_rank_as_kohyas_trainer_writes_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(96, 4, generator=generator), torch.randn(4, 32, generator=generator)
    stem = "lora_unet_joint_blocks_0_context_block_attn_qkv"
    tensors = {f"{stem}.lora_up.weight": up.half(), f"{stem}.lora_down.weight": down.half()}
    path = save({**tensors, f"{stem}.alpha": torch.tensor(1.0).half()}, tmp_path / "a.safetensors")
    whole = 0.25 * up.half().double() @ down.half().double()
    names = [f"transformer_blocks.0.attn.add_{each}_proj" for each in "qkv"]
    assert_same_updates(read_adapter(path), dict(zip(names, whole.split(32), strict=True)))


def full_width(rank: int) -> Adapter:
    """One double and one single block as wide as FLUX is, on inputs of 16 units."""
    generator = torch.Generator().manual_seed(0)
    double, single = "transformer_blocks.0", "single_transformer_blocks.0"
    sizes = {f"{double}.attn.{each}": 3072 for each in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out")}
    sizes |= {f"{double}.ff.net.0.proj": 12288, f"{double}.ff_context.net.2": 3072}
    sizes |= {f"{single}.attn.{each}": 3072 for each in ("to_q", "to_k", "to_v")}
    return Adapter({path: random_pair((size, 16), rank, generator) for path, size in sizes.items()})


@pytest.mark.parametrize("format", ["kohya", "comfy"])
def test_diffusers_takes_flux_apart_exactly(tmp_path: Path, format: str) -> None:
    adapter = full_width(rank=3)
    state: Any = FluxPipeline.lora_state_dict(str(write_adapter(adapter, tmp_path / "a.safetensors", format)))
    pairs: dict[str, Tensor] = {}
    for key in list(state):
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            product = state[f"{layer}.lora_B.weight"].double() @ state[key].double()
            if product.any() or layer.removeprefix("transformer.") in adapter.layers:
                pairs[layer.removeprefix("transformer.")] = product
    assert_same_updates(adapter, pairs)


def test_diffusers_loads_flux_double_blocks_into_a_model(tmp_path: Path) -> None:
    ends = ("attn.to_q", "attn.to_v", "to_out.0", "add_k_proj", "ff.net.2", "norm1_context.linear")
    layers = real_adapter("flux", *ends).layers
    adapter = Adapter({path: pair for path, pair in layers.items() if path.startswith("transformer_blocks.")})
    path = write_adapter(adapter, tmp_path / "a.safetensors", "kohya", family="flux")
    ours = tiny_flux()
    attach_adapter(ours, adapter, "content")
    stock: Any = tiny_flux()
    state: Any = FluxPipeline.lora_state_dict(str(path))
    FluxPipeline.load_lora_into_transformer(state, None, stock, adapter_name="content")
    torch.testing.assert_close(output(stock, flux_inputs()), output(ours, flux_inputs()), rtol=1e-4, atol=1e-5)


def test_diffusers_loads_sdxl_into_a_model(tmp_path: Path) -> None:
    # diffusers' own converter does not know every layer, but all that are commonly adapted.
    ends = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "conv1", "conv2", "conv_shortcut")
    adapter = real_adapter("sdxl", *ends, "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
    small = Adapter({path: LowRank(pair.B * 0.05, pair.A) for path, pair in adapter.layers.items()}, None, "unet")
    path = write_adapter(small, tmp_path / "a.safetensors", "kohya")
    ours, stock = tiny_sdxl(), tiny_sdxl()
    given = {
        "sample": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(1)),
        "added_cond_kwargs": {"text_embeds": torch.ones(1, 8), "time_ids": torch.ones(1, 6)},
    }

    def run(unet: Any) -> Tensor:
        with torch.no_grad():
            return unet(**given, return_dict=False)[0]

    base = run(ours)
    attach_adapter(ours, small, "content")
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(path), unet_config=stock.config)  # type: ignore[misc]
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, stock, adapter_name="content")
    torch.testing.assert_close(run(stock), run(ours), rtol=1e-4, atol=1e-5)
    assert float((run(ours) - base).norm() / base.norm()) > 1e-2


# What each family adapts, and diffusers' own loader of the files that kohya's tools write for it.
LOADERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "flux2": (Flux2Pipeline, ("attn.to_q", "to_add_out", "ff.linear_in", "ff_context.linear_out", "to_qkv_mlp_proj")),
    "qwen-image": (QwenImagePipeline, ("attn.to_q", "attn.add_k_proj", "to_out.0", "img_mlp.net.2")),
    "z-image": (ZImagePipeline, ("attention.to_q", "attention.to_k", "attention.to_out.0", "feed_forward.w2")),
}


# diffusers takes any `lora_down` of FLUX.2 for kohya's, and layers that ComfyUI fuses with kohya's prefix alone.
@pytest.mark.parametrize(
    ("kind", "format"),
    [("flux2", "kohya"), ("qwen-image", "kohya"), ("qwen-image", "comfy"), ("z-image", "kohya")],
)
def test_diffusers_reads_the_newer_families(tmp_path: Path, kind: str, format: str) -> None:
    pipeline, ends = LOADERS[kind]
    adapter = real_adapter(kind, *ends)
    state: Any = pipeline.lora_state_dict(str(write_adapter(adapter, tmp_path / "a.safetensors", format, family=kind)))
    found: dict[str, Tensor] = {}
    for key in state:
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            update = state[f"{layer}.lora_B.weight"].double() @ state[key].double()
            if update.any():  # parts of a fused layer that are not adapted
                found[layer.removeprefix("transformer.")] = update
    assert_same_updates(adapter, found)


def test_flux2_is_told_from_flux_by_its_shapes(tmp_path: Path) -> None:
    """They share names: a feed-forward of a double block, both layers of a single one."""
    for kind, end in (
        ("flux2", "ff.linear_in"),
        ("flux2", "linear_out"),
        ("flux2", "to_qkv_mlp_proj"),
        ("flux", "net.2"),
    ):
        adapter = real_adapter(kind, end)
        for format in ("kohya", "comfy"):
            path = write_adapter(adapter, tmp_path / f"{end}-{format}.safetensors", format, family=kind)
            assert_same_updates(read_adapter(path), adapter.layers)


def test_sd15s_text_encoder_has_no_number(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    words = Adapter({layer: random_pair((8, 8), 2, generator)}, None, "text_encoder")
    adapter = replace(real_adapter("sd15", "attn1.to_q"), companions={"text_encoder": words})
    path = write_adapter(adapter, tmp_path / "a.safetensors", "kohya")
    keys = load_file(path).keys()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in keys
    assert any(key.startswith("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q") for key in keys)
    assert_same_updates(read_adapter(path).companions["text_encoder"], words.layers)


def test_a_layer_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    adapter = Adapter(
        {"down_blocks.3.resnets.0.conv1": real_adapter("sdxl", "conv_in").layers["conv_in"]}, None, "unet"
    )
    with pytest.raises(QrloraError, match=r"down_blocks\.3\.resnets\.0\.conv1, which has no name .* of sdxl"):
        write_adapter(adapter, tmp_path / "a.safetensors", "kohya", family="sdxl")
    with pytest.raises(QrloraError, match=r"ends in \.safetensors"):
        write_adapter(real_adapter("sdxl", "conv_in"), tmp_path / "a.bin", "kohya", family="sdxl")
    with pytest.raises(QrloraError, match="use one of comfy, diffusers, kohya, own, peft"):
        write_adapter(adapter, tmp_path / "a.safetensors", "published")


def test_between_formats(tmp_path: Path) -> None:
    """Through every format that can be written, one after the other."""
    adapter = real_adapter("flux", *PUBLISHED, rank=2)
    current = adapter
    for number, format in enumerate(["kohya", "peft", "comfy", "diffusers", "comfy", "kohya", "diffusers"]):
        name = f"{number}" if format == "peft" else f"{number}.safetensors"
        current = read_adapter(write_adapter(current, tmp_path / name, format))
    assert_same_updates(current, adapter.layers)
    assert all(dense64(pair).any() for pair in current.layers.values())


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_from_kohya_into_stock_peft_and_diffusers(tmp_path: Path, kind: str) -> None:
    """As diffusers has no converter for kohya's SD3 files, ours is the way."""
    small = {path: LowRank(pair.B * 0.1, pair.A) for path, pair in real_adapter(kind, *PUBLISHED).layers.items()}
    file = write_adapter(Adapter(small), tmp_path / "a.safetensors", "kohya", family=kind)
    read = read_adapter(file)
    ours: Any = tiny(kind)
    attach_adapter(ours, Adapter(small), "content")
    expected = output(ours, inputs(kind))
    peft = PeftModel.from_pretrained(tiny(kind), str(write_adapter(read, tmp_path / "peft", "peft")))
    torch.testing.assert_close(output(peft.base_model.model, inputs(kind)), expected, rtol=1e-4, atol=1e-5)
    stock: Any = tiny(kind)
    native = write_adapter(read, tmp_path / "b.safetensors", "diffusers")
    stock.load_lora_adapter(str(native), prefix="transformer", adapter_name="content")
    torch.testing.assert_close(output(stock, inputs(kind)), expected, rtol=1e-4, atol=1e-5)


def test_a_header_that_another_tool_left_behind_is_ignored(tmp_path: Path) -> None:
    header = {"qrlora": '{"format_version": 1, "basis": "qr", "side": "output", "rank": 64}'}
    stem = "lora_unet_double_blocks_0_img_mlp_0"
    tensors = {f"{stem}.lora_up.weight": torch.ones(4, 2), f"{stem}.lora_down.weight": torch.ones(2, 4)}
    with pytest.warns(QrloraWarning, match="a qrlora header of rank 64, which is not its own"):
        assert read_adapter(save(tensors, tmp_path / "a.safetensors", header)).header is None
