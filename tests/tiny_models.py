"""Tiny denoisers of the true classes, randomly initialised from a seed, and inputs to run them on."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

# Names that match the last whole components of a path, both Linear and (on the U-Net) Conv2d layers.
FLUX_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj", "ff.net.2"]
SD3_TARGETS = ["attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out"]
UNET_TARGETS = ["attn1.to_q", "attn2.to_k", "attn2.to_out.0", "conv1", "conv_shortcut", "downsamplers.0.conv"]
TARGETS: Mapping[str, list[str]] = {"flux": FLUX_TARGETS, "sd3": SD3_TARGETS, "unet": UNET_TARGETS}
PREFIXES: Mapping[str, str] = {"flux": "transformer", "sd3": "transformer", "unet": "unet"}


def tiny_flux(seed: int = 0, *, width: int = 32, blocks: int = 2) -> FluxTransformer2DModel:
    """As many double as single `blocks`; 8 latent channels packed, text of `width`."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=width // 16,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def flux_inputs(seed: int = 0, *, width: int = 32, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, 4, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 3, width, generator=generator),
        "pooled_projections": torch.randn(batch, width, generator=generator),
        "timestep": torch.linspace(0.2, 0.8, batch),
        "img_ids": torch.stack([torch.zeros(4), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(3, 3),
    }


def tiny_sd3(seed: int = 0) -> SD3Transformer2DModel:
    """Two joint blocks on 8 x 8 latents of 4 channels."""
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


def sd3_inputs(seed: int = 0, *, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 3, 32, generator=generator),
        "pooled_projections": torch.randn(batch, 32, generator=generator),
        "timestep": torch.linspace(200, 800, batch),
    }


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """A down and an up path with cross-attention on 8 x 8 latents of 4 channels."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def unet_inputs(seed: int = 0, *, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.linspace(200, 800, batch),
        "encoder_hidden_states": torch.randn(batch, 3, 32, generator=generator),
    }


def tiny(kind: str, seed: int = 0) -> nn.Module:
    """The tiny denoiser "flux", "sd3" or "unet"."""
    return {"flux": tiny_flux, "sd3": tiny_sd3, "unet": tiny_unet}[kind](seed)


def inputs(kind: str, seed: int = 0) -> dict[str, Tensor]:
    return {"flux": flux_inputs, "sd3": sd3_inputs, "unet": unet_inputs}[kind](seed)


def run(denoiser: Any, given: Mapping[str, Tensor]) -> Tensor:
    """One forward pass in the denoiser's dtype."""
    cast = {
        key: value.to(denoiser.dtype) if value.is_floating_point() and "ids" not in key and key != "timestep" else value
        for key, value in given.items()
    }
    return denoiser(**cast, return_dict=False)[0]


def output(denoiser: Any, given: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return run(denoiser, given)
