"""The tensors of QR-LoRA files as the published code writes them, built from the formulas."""

from collections.abc import Mapping

import torch
from torch import Tensor

RANK = 3
SINGLE, OUT, FF = (
    "single_transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.ff.net.0.proj",
)
FLUX = {SINGLE: (12, 12), OUT: (12, 12), FF: (20, 12)}
SD3 = {"transformer_blocks.0.attn.to_q": (12, 12), OUT: (12, 12), "transformer_blocks.0.attn.add_k_proj": (12, 12)}


def weights(shapes: Mapping[str, tuple[int, int]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(shape, generator=generator) for layer, shape in shapes.items()}


def q_and_r(weight: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """`qr` of the truncated singular value decomposition, with the library's signs, in float64."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    Q, R = torch.linalg.qr(U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank])
    return Q[:, :rank], R[:rank]


def stored(tensors: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    names = ("q", "delta_r", "base_r")
    return {
        f"transformer.{layer}.lora.{name}.weight": tensor.float()
        for layer, parts in tensors.items()
        for name, tensor in zip(names, parts, strict=True)
    }


def qr_parts(shapes: Mapping[str, tuple[int, int]], seed: int, *, upper: bool) -> dict[str, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, tuple[Tensor, ...]] = {}
    for layer, weight in weights(shapes).items():
        Q, R = q_and_r(weight)
        delta = torch.randn(R.shape, generator=generator).double()
        parts[layer] = (Q.float(), (delta.triu() if upper else delta).float(), R.float())
    return parts
