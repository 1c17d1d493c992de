"""LoRA-XS: a small trained core between two frozen factors."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from qrlora.adapter._cache import BasisCache
from qrlora.adapter._spec import AdapterSpec
from qrlora.adapter.forms._form import Factor, Form, Held, Start, check_basis, register_form, shapes, times
from qrlora.adapter.forms.coefficients import generator_for, seed_for
from qrlora.basis import Side, basis_names, make_pair, pair_basis, pair_names
from qrlora.errors import QrloraError
from qrlora.formats import Header, LowRank

_CORE = "core"
_MISFIT = 1e-2
"""Of a file in bf16 the factors are rounded by 2e-3; those of another base or basis are off by about 1."""


@register_form
class CoreForm(Form):
    """`W' = W + s L C R` with `C [r, r]` trained from zero between the pair `(L, R)` of a basis (arXiv 2405.17604).

    Pairs are registered in `qrlora.basis` (`register_pair`): for the bases `(Q, Q^T W)`, so `(U_r, S_r V_r^T)` for svd,
    and two random frames for random. Exported as an ordinary LoRA of rank r, which on side output is `B = L`, `A = s C
    R`: adapters of one weight share L, and merge exactly by their sum.
    """

    name = "core"
    has_update = True
    trained_own = (_CORE,)

    def check(self, spec: AdapterSpec) -> None:
        check_basis(spec, *pair_names(), orthonormal=True)

    def start(self, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        core = torch.zeros(spec.rank, spec.rank)
        if spec.init == "normal":
            core = torch.randn(core.shape, generator=generator_for(spec, layer)) * spec.init_std
        return Start(_frozen_pair(weight, spec, layer, cache), {_CORE: core})

    def frozen(self, side: Side | None) -> tuple[Factor, ...]:
        return ("lora_A", "lora_B")

    def side(self, spec: AdapterSpec) -> Side | None:
        return spec.side if spec.basis in basis_names() else None

    def update(self, held: Held, x: Tensor, base: Callable[[], Tensor]) -> Tensor:
        # The core goes into the smaller product's weight: two passes, as for an ordinary LoRA.
        return held.scale * held.through_B(_times_core(held.B, held.own[_CORE]), held.through_A(held.A, x))

    def export(self, held: Held) -> Start:
        core = held.own[_CORE] if held.scale == 1 else times(held.own[_CORE], held.scale)
        if held.side == "input":
            return Start(LowRank(_times_core(held.B, core), held.A))
        return Start(LowRank(held.B, (core @ held.A.flatten(1)).reshape(held.A.shape)))

    def kept(self, held: Held) -> Mapping[str, Tensor]:
        return {"lora_B": held.B, "lora_A": held.A}

    def resume(self, saved: Start, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        """The pair is made again, and the core read off by least squares."""
        pair = _frozen_pair(weight, spec, layer, cache)
        on_input = self.side(spec) == "input"
        # L C = B on the input side, R^T C^T = A^T on the output side.
        fixed = pair.B.flatten(1) if on_input else pair.A.flatten(1).T
        product = saved.pair.B.flatten(1) if on_input else saved.pair.A.flatten(1).T
        core, misfit = _least_squares(fixed.double(), product.double())
        if misfit > _MISFIT:
            raise QrloraError(
                f"{layer} is no core adapter of basis {spec.basis!r} on this base model: its frozen factors are others."
            )
        core = (core if on_input else core.T) / spec.scale
        # The file's own frozen factor stays: one computed again may differ in signs or in its last digits.
        kept = LowRank(pair.B, saved.pair.A) if on_input else LowRank(saved.pair.B, pair.A)
        return Start(kept, {_CORE: core.float().contiguous()})

    def trained_size(self, pair: LowRank, own: Mapping[str, Tensor], header: Header | None) -> int:
        return pair.rank**2


def _least_squares(factor: Tensor, product: Tensor) -> tuple[Tensor, float]:
    """The X of `factor X = product`, and how far off the product it is, relative."""
    solution = cast(Tensor, cast(Any, torch.linalg).lstsq(factor, product, driver="gelsd").solution)
    size = float(product.square().sum().sqrt())
    off = float((factor @ solution - product).square().sum().sqrt())
    return solution, off / size if size else off


def _times_core(B: Tensor, core: Tensor) -> Tensor:
    return (B.flatten(1) @ core).reshape(B.shape)


def _frozen_pair(weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> LowRank:
    source = pair_basis(spec.basis)
    vectors = None
    if source is not None:
        vectors = cache.get(weight, spec.model_copy(update={"basis": source}), layer).vectors
    left, right = make_pair(
        weight,
        spec.rank,
        spec.basis,
        vectors=vectors,
        side=spec.side,
        seed=seed_for(spec, layer),
        layer=layer,
    )
    b_shape, a_shape = shapes(weight, spec.rank)
    return LowRank(left.cpu().reshape(b_shape), right.cpu().reshape(a_shape))
