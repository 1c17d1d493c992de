"""DoRA, a baseline: plain LoRA, and a trained magnitude for each row of the weight."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from qrlora.adapter._cache import BasisCache
from qrlora.adapter._spec import AdapterSpec
from qrlora.adapter.forms._form import Form, Held, Start, check_own_basis, register_form
from qrlora.adapter.forms.lora import plain_pair
from qrlora.errors import QrloraError
from qrlora.formats._adapter import MAGNITUDE


@register_form
class DoraForm(Form):
    """`W' = m (W + s B A) / |W + s B A|`, norms of rows, `m` trained from `|W|` (arXiv 2402.09353).

    Active beside other adapters it adds `(W' - W) x`, whatever their order. peft's own rescales the output of the
    adapters before it too, so that there the order counts; one DoRA adapter alone, or the first, is the same. peft's
    also takes the norms in the compute dtype, so on a bf16 base it does not start from exactly the base; here they are
    fp32. As there, the norm is a constant for the gradient, and the weight of `set_adapters` scales B A alone.
    """

    name = "dora"
    bases = ("dora",)
    trained_own = (MAGNITUDE,)
    has_update = True
    low_rank = False

    def check(self, spec: AdapterSpec) -> None:
        check_own_basis(spec)

    def start(self, weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> Start:
        pair = plain_pair(weight, spec, layer)
        norms = _row_norms(weight, None).cpu()
        # As peft shapes it: [out] for a Linear, [1, out, 1, 1] for a convolution.
        return Start(pair, {MAGNITUDE: norms if weight.ndim == 2 else norms.reshape(1, -1, 1, 1)})

    def check_saved(self, saved: Start, layer: str) -> None:
        magnitude = saved.own.get(MAGNITUDE)
        if magnitude is None or set(saved.own) != {MAGNITUDE} or magnitude.numel() != saved.pair.B.shape[0]:
            raise QrloraError(
                f"{layer} says that it is a DoRA layer, but has no magnitude of {saved.pair.B.shape[0]} rows; the file "
                "is damaged, or another tool has dropped it."
            )

    def update(self, held: Held, x: Tensor, base: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            change = held.scale * (held.B.flatten(1).float() @ held.A.flatten(1).float())
            norms = _row_norms(held.dense(), change)
        channels = (1, -1, 1, 1) if held.A.ndim == 4 else (-1,)
        # A row that is all zero (pruned, or zero at the start of its training) has no direction to scale.
        safe = torch.where(norms > 0, norms, torch.ones_like(norms))
        scaled = torch.where(norms > 0, held.own[MAGNITUDE].flatten() / safe, torch.ones_like(norms))
        ratio = scaled.reshape(channels)
        low_rank = held.scale * held.through_B(held.B, held.through_A(held.A, x))
        return (ratio - 1) * base() + ratio * low_rank


def _row_norms(weight: Tensor, change: Tensor | None) -> Tensor:
    """`[out]`, in fp32, of a weight plus a change `[out, n]`."""
    rows = weight.detach().flatten(1).float()
    norm = cast(Any, torch.linalg).vector_norm
    return norm(rows if change is None else rows + change, dim=1)
