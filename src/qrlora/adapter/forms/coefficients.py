"""QR-LoRA and its relatives: one factor is a basis, frozen, the other is trained."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qrlora.adapter._cache import BasisCache, layer_seed
from qrlora.adapter._spec import AdapterSpec
from qrlora.adapter.forms._form import COEFFICIENTS, Factor, Form, Start, register_form, shapes, upper_triangle
from qrlora.basis import Side
from qrlora.formats import Header, LowRank


@register_form
class CoefficientsForm(Form):
    """`W' = W + s Q dR` with `Q` frozen (side output), or `W + s dL Q^T` (side input).

    For `basis="qr"` this is the published `W_res + s Q (R + dR)`, `W_res = W - s Q R` (QR-LoRA, ICCV 2025), without its
    residual.
    """

    name = COEFFICIENTS
    masks = True
    names_itself = False

    def start(self, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        vectors = cache.get(weight, spec, layer).vectors
        b_shape, a_shape = shapes(weight, spec.rank)
        if spec.side == "output":
            return Start(LowRank(vectors.reshape(b_shape), drawn(a_shape, spec, layer, "lora_A")))
        return Start(LowRank(drawn(b_shape, spec, layer, "lora_B"), vectors.T.reshape(a_shape)))

    def frozen(self, side: Side | None) -> tuple[Factor, ...]:
        return () if side is None else ("lora_B",) if side == "output" else ("lora_A",)

    def side(self, spec: AdapterSpec) -> Side | None:
        return spec.side

    def trained_size(self, pair: LowRank, own: Mapping[str, Tensor], header: Header | None) -> int:
        if header is None or header.side is None:
            return pair.A.numel() + pair.B.numel()
        trained = pair.A if header.side == "output" else pair.B
        rank = pair.rank
        return trained.numel() - (rank * (rank - 1) // 2 if header.mask == "upper" else 0)


def drawn(
    shape: tuple[int, ...], spec: AdapterSpec, layer: str, factor: Factor, generator: torch.Generator | None = None
) -> Tensor:
    """The start of a trained factor: zero, or normal with its masked entries zero, from a seed for each layer."""
    if spec.init == "zero":
        return torch.zeros(shape)
    values = torch.randn(shape, generator=generator or generator_for(spec, layer)) * spec.init_std
    return upper_triangle(values, factor) if spec.mask == "upper" else values


def generator_for(spec: AdapterSpec, layer: str) -> torch.Generator:
    """Random numbers for one layer, the same whatever other layers there are."""
    return torch.Generator().manual_seed(seed_for(spec, layer))


def seed_for(spec: AdapterSpec, layer: str) -> int:
    """One layer's own seed."""
    return layer_seed(spec.seed, layer)
