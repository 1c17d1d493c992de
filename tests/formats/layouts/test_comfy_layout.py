"""The spellings that ComfyUI's loader takes, each with the same updates."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats import import_adapter, read_adapter
from tests.real_layers import assert_same_updates, save

Q, TEXT_Q = "transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.add_q_proj"
UNET_OUT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
UNET_CONV = "up_blocks.1.resnets.2.conv_shortcut"


def factors(rows: int = 6, inputs: int = 5, rank: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator), torch.randn(rank, inputs, generator=generator)


@pytest.mark.parametrize(
    ("stem", "layer"),
    [
        ("diffusion_model.double_blocks.1.img_mlp.0", "transformer_blocks.1.ff.net.0.proj"),
        ("model.diffusion_model.double_blocks.1.img_mlp.0", "transformer_blocks.1.ff.net.0.proj"),
        ("transformer.double_blocks.1.txt_attn.proj", "transformer_blocks.1.attn.to_add_out"),
        ("double_blocks.1.txt_mlp.2", "transformer_blocks.1.ff_context.net.2"),
        ("single_blocks.7.linear2", "single_transformer_blocks.7.proj_out"),
        ("diffusion_model.joint_blocks.12.x_block.mlp.fc1", "transformer_blocks.12.ff.net.0.proj"),
        ("lora_unet_joint_blocks_12_context_block_mlp_fc2", "transformer_blocks.12.ff_context.net.2"),
        ("lora_transformer_transformer_blocks_1_attn_to_q", Q),
        ("lycoris_transformer_blocks_1_attn_add_q_proj", TEXT_Q),
        ("base_model.model.transformer_blocks.1.attn.to_q", Q),
        ("transformer_blocks.1.attn.to_q", Q),
        ("diffusion_model.transformer_blocks.1.attn.to_q", Q),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0", UNET_OUT),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0", UNET_OUT),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0", UNET_OUT),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", UNET_OUT),
        ("diffusion_model.output_blocks.5.0.skip_connection", UNET_CONV),
        ("lycoris_up_blocks_1_resnets_2_conv_shortcut", UNET_CONV),
    ],
)
@pytest.mark.parametrize(
    "suffixes", [(".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"), (".lora_B", ".lora_A")]
)
def test_prefixes_and_suffixes(tmp_path: Path, stem: str, layer: str, suffixes: tuple[str, str]) -> None:
    B, A = factors()
    path = save({stem + suffixes[0]: B, stem + suffixes[1]: A}, tmp_path / "a.safetensors")
    assert_same_updates(read_adapter(path), {layer: B.double() @ A.double()})
    save({stem + suffixes[0]: B, stem + suffixes[1]: A, f"{stem}.alpha": torch.tensor(1.0)}, path)
    assert_same_updates(read_adapter(path), {layer: 0.5 * B.double() @ A.double()})


@pytest.mark.parametrize(
    "stem",
    [
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
        "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora",
    ],
)
def test_diffusers_before_peft(tmp_path: Path, stem: str) -> None:
    B, A = factors()
    path = save({f"{stem}.up.weight": B, f"{stem}.down.weight": A}, tmp_path / "a.safetensors")
    assert_same_updates(read_adapter(path), {UNET_OUT: B.double() @ A.double()})


def test_fused_names_with_dots(tmp_path: Path) -> None:
    B, A = factors(rows=42)
    stem = "diffusion_model.single_blocks.3.linear1"
    path = save({f"{stem}.lora_B.weight": B, f"{stem}.lora_A.weight": A}, tmp_path / "a.safetensors")
    names = [f"single_transformer_blocks.3.{each}" for each in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    parts = (B.double() @ A.double()).split([6, 6, 6, 24])
    assert_same_updates(read_adapter(path), dict(zip(names, parts, strict=True)))


def test_the_account_of_keys(tmp_path: Path) -> None:
    B, A = factors(rows=9)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    others = {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": B, "what.is.this": A}
    path = save({f"{stem}.lora_B.weight": B, f"{stem}.lora_A.weight": A, **others}, tmp_path / "a.safetensors")
    with pytest.raises(QrloraError, match=r"2 of 4 keys .* ComfyUI, 1 of them of text encoders: .*what\.is\.this"):
        read_adapter(path)
    found = import_adapter(path, allow_unmatched=True).recognised
    assert set(found.unmatched) == set(others)
    assert found.matched[f"{stem}.lora_A.weight"] == ", ".join(f"transformer_blocks.0.attn.to_{each}" for each in "qkv")
    assert "most diffusion_model.LAYER.lora_" in found.evidence


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lycoris_transformer_blocks_1_attn_to_q.lora_up.weight": torch.ones(4, 2)}, "not both factors"),
        ({"diffusion_model.img_in.alpha": torch.tensor(1.0)}, "not both factors"),
        (
            {
                "diffusion_model.img_in.lora_up.weight": torch.ones(4, 2),
                "diffusion_model.img_in.lora_down.weight": torch.ones(2, 4),
                "img_in.lora_A.weight": torch.ones(2, 4),
            },
            "the same thing twice",
        ),
        (
            {
                "diffusion_model.img_in.lora_up.weight": torch.ones(4, 2),
                "diffusion_model.img_in.lora_down.weight": torch.ones(2, 4),
                "x_embedder.lora_B.weight": torch.ones(4, 2),
                "x_embedder.lora_A.weight": torch.ones(2, 4),
            },
            "has x_embedder twice",
        ),
        (
            {
                "diffusion_model.img_in.lora_up.weight": torch.ones(4, 2),
                "diffusion_model.img_in.lora_down.weight": torch.ones(2, 4),
                "diffusion_model.out.2.lora_up.weight": torch.ones(4, 2),
                "diffusion_model.out.2.lora_down.weight": torch.ones(2, 4),
            },
            "holds both img_in and out.2",
        ),
        (
            {
                "diffusion_model.img_in.lora_up.weight": torch.ones(4, 3),
                "diffusion_model.img_in.lora_down.weight": torch.ones(2, 4),
            },
            "no low-rank pair",
        ),
        (
            {
                "diffusion_model.img_in.lora_up.weight": torch.ones(4, 2, dtype=torch.int32),
                "diffusion_model.img_in.lora_down.weight": torch.ones(2, 4),
            },
            "floating point",
        ),
        (
            {
                "diffusion_model.img_in.lora_up.weight": torch.ones(4, 2),
                "diffusion_model.img_in.lora_down.weight": torch.ones(2, 4),
                "diffusion_model.img_in.alpha": torch.ones(3),
            },
            "not one number",
        ),
        (
            {
                "diffusion_model.img_in.lora_up.weight": torch.ones(4, 2),
                "diffusion_model.img_in.lora_down.weight": torch.ones(2, 4),
                "diffusion_model.img_in.alpha": torch.tensor(float("nan")),
            },
            "not finite",
        ),
    ],
)
def test_what_does_not_add_up(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(QrloraError, match=message):
        read_adapter(save(tensors, tmp_path / "a.safetensors"))


@pytest.mark.parametrize("key", ["dora_scale", "lora_mid.weight", "hada_w1_a", "lokr_w2", "reshape_weight"])
@pytest.mark.parametrize("allow", [False, True])
def test_other_methods_are_never_left_out(tmp_path: Path, key: str, allow: bool) -> None:
    B, A = factors()
    stem = "lora_unet_double_blocks_1_img_mlp_0"
    tensors = {f"{stem}.lora_up.weight": B, f"{stem}.lora_down.weight": A, f"{stem}.{key}": torch.ones(3)}
    with pytest.raises(QrloraError, match=r"more than W \+ B A"):
        read_adapter(save(tensors, tmp_path / "a.safetensors"), allow_unmatched=allow)
