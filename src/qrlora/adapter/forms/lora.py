"""Plain LoRA, the baseline: both factors are trained."""

import math

import torch
from torch import Tensor

from qrlora.adapter._cache import BasisCache
from qrlora.adapter._spec import PLAIN_LORA, AdapterSpec
from qrlora.adapter.forms._form import Form, Start, check_own_basis, register_form, shapes
from qrlora.adapter.forms.coefficients import drawn, generator_for
from qrlora.basis import as_matrix
from qrlora.formats import LowRank


@register_form
class LoraForm(Form):
    """`W' = W + s B A` from `B = 0` and peft's own start of A, uniform within `1 / sqrt(fan_in)` (arXiv 2106.09685)."""

    name = PLAIN_LORA
    bases = (PLAIN_LORA,)
    names_itself = False

    def check(self, spec: AdapterSpec) -> None:
        check_own_basis(spec)

    def start(self, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        return Start(plain_pair(weight, spec, layer))


def plain_pair(weight: Tensor, spec: AdapterSpec, layer: str) -> LowRank:
    """LoRA's own start: A drawn from a seed for each layer, B zero."""
    b_shape, a_shape = shapes(weight, spec.rank)
    generator = generator_for(spec, layer)
    fan_in = as_matrix(weight, layer=layer).shape[1]
    uniform = (torch.rand(a_shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
    return LowRank(drawn(b_shape, spec, layer, "lora_B", generator), uniform)
