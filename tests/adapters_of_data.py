"""Adapters as plain data, made from a seed."""

from dataclasses import replace

import torch
from torch import Tensor

from qrlora.formats import Adapter, Component, Header, LowRank

LINEAR, CONV = "blocks.0.attn.to_q", "blocks.10.conv"


def orthonormal(rows: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))[0].float()


def made(
    seed: int = 0,
    *,
    basis_seed: int = 7,
    rank: int = 3,
    side: str | None = "output",
    header: bool = True,
    **fields: object,
) -> Adapter:
    """A Linear (12 x 10) and a Conv2d (8 x 4 x 3 x 3) layer; adapters of one `basis_seed` share their bases."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if side == "input":
        linear = LowRank(noise(12, rank), orthonormal(10, rank, basis_seed).T.contiguous())
        conv = LowRank(noise(8, rank, 1, 1), orthonormal(36, rank, basis_seed + 1).T.reshape(rank, 4, 3, 3))
    else:
        linear = LowRank(orthonormal(12, rank, basis_seed), noise(rank, 10))
        conv = LowRank(orthonormal(8, rank, basis_seed + 1).reshape(8, rank, 1, 1), noise(rank, 4, 3, 3))
    values: dict[str, object] = {"basis": "qr" if side else "lora", "side": side, "mask": "full", "rank": rank} | fields
    return Adapter({LINEAR: linear, CONV: conv}, Header.model_validate(values) if header else None)


def dense(adapter: Adapter, layer: str) -> Tensor:
    """`dW` in float64, worked out here."""
    pair = adapter.layers[layer]
    return pair.B.double().flatten(1) @ pair.A.double().flatten(1)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def with_words(seed: int, *components: Component, words_basis: int = 20, **fields: object) -> Adapter:
    """`made`, with an adapter of one layer (6 x 10) for each of these text encoders; `fields` are in its header."""
    companions: dict[Component, Adapter] = {}
    for index, component in enumerate(components):
        generator = torch.Generator().manual_seed(100 * seed + index)
        pair = LowRank(orthonormal(6, 3, words_basis + index), torch.randn(3, 10, generator=generator))
        header = Header.model_validate({"basis": "qr", "side": "output", "mask": "full", "rank": 3} | fields)
        companions[component] = Adapter({"text_model.encoder.layers.0.self_attn.q_proj": pair}, header, component)
    return replace(made(seed), companions=companions)
