"""Both factors of a decomposition of W trained together, and peft's initialisations that start there."""

from collections.abc import Callable, Mapping
from math import sqrt

import torch
from torch import Tensor

from qrlora.adapter._cache import BasisCache
from qrlora.adapter._spec import AdapterSpec
from qrlora.adapter.forms._form import (
    Form,
    Held,
    Start,
    check_basis,
    check_starts_at_base,
    register_form,
    shapes,
    times,
)
from qrlora.adapter.forms.coefficients import seed_for
from qrlora.basis import basis_names, make_pair
from qrlora.errors import QrloraError
from qrlora.formats import Header, LowRank

_START_B, _START_A = "start_B", "start_A"


@register_form
class BothForm(Form):
    """`W' = W + s (B A - B_0 A_0)` from `B = B_0`, `A = A_0`: QR-LoRA's "fast convergence" script, with W left alone.

    `B_0 A_0` is `Q (Q^T W)` for a basis (`(W Q) Q^T` on the input side); for `pissa` `(U S^1/2) (S^1/2 V^T) / s` (arXiv
    2404.02948) and for `olora` `Q_r R_r` of `Q R = W` (arXiv 2406.01775), whose own versions put `W - s B_0 A_0` in the
    place of W. With `dB = B - B_0` and `dA = A - A_0` it is computed, and exported at rank 2r, as

        B A - B_0 A_0 = B_0 dA + dB A = [B_0, dB] [dA; A]

    which is zero at the start to the last bit, and loses nothing where `[B, -B_0] [A; A_0]` would cancel.
    """

    name = "both"
    bases = ("pissa", "olora")
    has_update = True

    def check(self, spec: AdapterSpec) -> None:
        check_basis(spec, *self.bases, orthonormal=True)
        check_starts_at_base(spec, self)

    def start(self, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        left, right = start_factors(weight, spec, layer, cache)
        b_shape, a_shape = shapes(weight, spec.rank)
        pair = LowRank(left.reshape(b_shape), right.reshape(a_shape))
        return Start(pair, {_START_B: pair.B, _START_A: pair.A})

    def update(self, held: Held, x: Tensor, base: Callable[[], Tensor]) -> Tensor:
        doubled = _doubled(held)
        return held.scale * held.through_B(doubled.B, held.through_A(doubled.A, x))

    def export(self, held: Held) -> Start:
        doubled = _doubled(held)
        return Start(LowRank(doubled.B, doubled.A if held.scale == 1 else times(doubled.A, held.scale)))

    def kept(self, held: Held) -> Mapping[str, Tensor]:
        return held.own

    def resume(self, saved: Start, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        b_start, b_change = saved.pair.B.chunk(2, dim=1)
        a_change, a_now = (part if spec.scale == 1 else times(part, 1 / spec.scale) for part in saved.pair.A.chunk(2))
        pair = LowRank(b_start + b_change, a_now.contiguous())
        return Start(pair, {_START_B: b_start.contiguous(), _START_A: a_now - a_change})

    def check_saved(self, saved: Start, layer: str) -> None:
        super().check_saved(saved, layer)
        if saved.pair.rank % 2:
            raise QrloraError(
                f"{layer} has the odd rank {saved.pair.rank}, but form 'both' has twice a rank; the file is "
                "damaged, or its header is of another one."
            )

    def rank(self, pair: LowRank) -> int:
        return pair.rank // 2

    def trained_size(self, pair: LowRank, own: Mapping[str, Tensor], header: Header | None) -> int:
        return super().trained_size(pair, own, header) // 2


def _doubled(held: Held) -> LowRank:
    b_start, a_start = held.own[_START_B], held.own[_START_A]
    return LowRank(
        torch.cat([b_start, held.B - b_start], dim=1),
        torch.cat([held.A - a_start, held.A]),
    )


def start_factors(weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> tuple[Tensor, Tensor]:
    """`B_0 [out, r]` and `A_0 [r, n]` on the CPU."""
    if spec.basis in basis_names():
        vectors = cache.get(weight, spec, layer).vectors
        left, right = make_pair(weight, spec.rank, vectors=vectors, side=spec.side, layer=layer)
        return left.cpu(), right.cpu()
    vectors = cache.get(weight, svd_of(spec), layer).vectors if spec.basis == "pissa" else None
    left, right = make_pair(
        weight, spec.rank, spec.basis, vectors=vectors, side=spec.side, seed=seed_for(spec, layer), layer=layer
    )
    # peft's PiSSA takes out s B_0 A_0 = W_r; its OLoRA takes out s Q_r R_r.
    share = 1 / sqrt(spec.scale) if spec.basis == "pissa" else 1.0
    return left.cpu() * share, right.cpu() * share


def svd_of(spec: AdapterSpec) -> AdapterSpec:
    """The spec of the singular vectors that a pair is made from."""
    return spec.model_copy(update={"basis": "svd"})
