"""Freq-MoE: spectral bands as experts, weighed for every token by a learned gate."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qrlora.adapter._cache import BasisCache, layer_seed
from qrlora.adapter._spec import AdapterSpec
from qrlora.adapter.forms._form import Factor, Form, Held, Start, check_basis, register_form, times
from qrlora.adapter.forms.coefficients import drawn
from qrlora.basis import Side, as_matrix, qr_bands
from qrlora.errors import QrloraError
from qrlora.formats import Header, LowRank

GATE_WEIGHT, GATE_BIAS, TOP_K = "gate_weight", "gate_bias", "top_k"
_BASES = ("qr", "svd")


@register_form
class GatedForm(Form):
    """`y = W x + s Q (expand(g(x)) * dR x)`, `g(x) = softmax(G x + b)` over the experts (Freq-MoE).

    The rank is cut into equal spectral bands, an expert each: `Q = [Q_1 ... Q_E]` with `Q_i` from the QR of band i of
    the SVD. The gate weighs the coefficients of a token by its expert; with `top_k`, the k largest weights alone are
    kept and scaled to sum to 1. The base is not gated. Gate and dR are trained, dR from zero. Adapters that are active
    together keep their own gates and are summed.
    """

    name = "gated"
    fields = ("experts", "top_k")
    has_update = True
    low_rank = False
    trained_own = (GATE_WEIGHT, GATE_BIAS)

    def check(self, spec: AdapterSpec) -> None:
        check_basis(spec)
        if spec.basis not in _BASES or spec.side != "output" or spec.band is not None:
            raise QrloraError(
                "a gated adapter cuts the leading singular vectors of the output side into bands itself: it needs "
                "basis qr or svd, side output and no band."
            )
        if spec.experts is None:
            raise QrloraError('form="gated" needs the number of experts; set experts to 4 or 8.')
        if spec.rank % spec.experts:
            raise QrloraError(f"experts={spec.experts} does not divide the rank {spec.rank}; change one of them.")
        if spec.top_k is not None and spec.top_k > spec.experts:
            raise QrloraError(f"top_k={spec.top_k} exceeds experts={spec.experts}; lower it.")

    def rank_limit(self, weight: Tensor, spec: AdapterSpec, layer: str) -> int:
        if weight.ndim != 2:
            raise QrloraError(f"{layer} is a convolution, which has no tokens to gate; leave it out of target_modules.")
        return super().rank_limit(weight, spec, layer)

    def start(self, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        assert spec.experts is not None
        inputs = as_matrix(weight, layer=layer).shape[1]
        vectors = cache.get(weight, spec.model_copy(update={"basis": "svd"}), layer).vectors
        if spec.basis == "qr":
            vectors = qr_bands(weight.cpu(), vectors, spec.experts, layer=layer)
        # As torch starts a Linear. Were it zero, the top k would stay the first k: the others would get no gradient.
        generator = torch.Generator().manual_seed(layer_seed(spec.seed, f"{layer}.gate"))
        gate, bias = (
            (torch.rand(shape, generator=generator) * 2 - 1) * inputs**-0.5
            for shape in ((spec.experts, inputs), (spec.experts,))
        )
        own = {GATE_WEIGHT: gate, GATE_BIAS: bias}
        if spec.top_k is not None:
            # As long as k, so that no forward has to read a number off the device.
            own[TOP_K] = torch.ones(spec.top_k)
        return Start(LowRank(vectors, drawn((spec.rank, inputs), spec, layer, "lora_A")), own)

    def frozen(self, side: Side | None) -> tuple[Factor, ...]:
        return ("lora_B",)

    def side(self, spec: AdapterSpec) -> Side | None:
        return "output"

    def update(self, held: Held, x: Tensor, base: Callable[[], Tensor]) -> Tensor:
        coefficients = held.through_A(held.A, x)
        gates = gate_weights(held, x).to(coefficients.dtype).unsqueeze(-1)
        by_expert = coefficients.reshape(*gates.shape[:-1], -1)
        return held.scale * held.through_B(held.B, (by_expert * gates).flatten(-2))

    def export(self, held: Held) -> Start:
        A = held.A if held.scale == 1 else times(held.A, held.scale)
        return Start(LowRank(held.B, A), held.own)

    def check_saved(self, saved: Start, layer: str) -> None:
        pair, own = saved.pair, saved.own
        gate, bias, top_k = own.get(GATE_WEIGHT), own.get(GATE_BIAS), own.get(TOP_K)
        fits = (
            set(own) <= {GATE_WEIGHT, GATE_BIAS, TOP_K}
            and gate is not None
            and bias is not None
            and pair.A.ndim == gate.ndim == 2
            and gate.shape[0] > 1
            and gate.shape[1] == pair.A.shape[1]
            and bias.shape == gate.shape[:1]
            and pair.rank % gate.shape[0] == 0
            and (top_k is None or (top_k.ndim == 1 and 1 <= len(top_k) <= gate.shape[0]))
        )
        if not fits:
            shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(own.items()))
            raise QrloraError(
                f"{layer}: {shapes or 'no gate'} beside A {list(pair.A.shape)} is no gated adapter; expected "
                "gate_weight [experts, in] and gate_bias [experts], with experts that divide the rank."
            )

    def resume(self, saved: Start, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        top_k = saved.own.get(TOP_K)
        has = (len(saved.own[GATE_BIAS]), None if top_k is None else len(top_k))
        if has != (spec.experts, spec.top_k):
            raise QrloraError(
                f"{layer} has experts={has[0]} and top_k={has[1]}, but experts={spec.experts} and top_k={spec.top_k} "
                "are asked for; train it as it is."
            )
        return super().resume(saved, weight, spec, layer, cache)

    def trained_size(self, pair: LowRank, own: Mapping[str, Tensor], header: Header | None) -> int:
        return pair.A.numel() + sum(own[key].numel() for key in self.trained_own)


def gate_weights(held: Held, x: Tensor) -> Tensor:
    """The weight of every expert for every token: `[..., experts]` for `x [..., in]`, each row summing to 1."""
    gates = F.linear(x, held.own[GATE_WEIGHT], held.own[GATE_BIAS]).softmax(dim=-1)
    if TOP_K not in held.own:
        return gates
    values, indices = gates.topk(held.own[TOP_K].shape[0], dim=-1)
    return torch.zeros_like(gates).scatter(-1, indices, values / values.sum(dim=-1, keepdim=True))
