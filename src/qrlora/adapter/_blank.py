"""Adapters without values, on denoisers without values: what would be trained, and room for it."""

import torch
from torch import Tensor, nn

from qrlora.adapter._cache import BasisCache
from qrlora.adapter._peft import Injection, Record, as_mixin, check_new_name, inject, masked_factor
from qrlora.adapter._spec import PLAIN_LORA, AdapterSpec
from qrlora.adapter._weights import base_layer, check_adaptable
from qrlora.adapter.forms import Start, form_of
from qrlora.adapter.forms._form import COEFFICIENTS, check_spec
from qrlora.adapter.targets import adaptable_layers, target_layers
from qrlora.basis import Basis, as_matrix
from qrlora.errors import QrloraError
from qrlora.formats import Header


class _BlankBases(BasisCache):
    """Bases of the right shape, without values."""

    def __init__(self) -> None:
        self.folder = None  # pyright: ignore[reportAttributeAccessIssue]  (nothing is kept)

    def get(self, weight: Tensor, spec: AdapterSpec, layer: str) -> Basis:
        out, inputs = as_matrix(weight, layer=layer).shape
        size = out if spec.side == "output" else inputs
        return Basis(torch.empty(size, spec.rank, device="meta"), spec.basis, spec.side, spec.basis, 0.0)


def add_blank_adapter(denoiser: nn.Module, spec: AdapterSpec, adapter_name: str = "default") -> dict[str, int]:
    """What `add_adapter` would put on a denoiser, on the meta device: layers, shapes and what is trained, no values.

    Args:
        denoiser: on the meta device.
        spec: coefficients or plain LoRA.
        adapter_name: as for `add_adapter`.

    Returns:
        By layer, in the order of the model, how many numbers are trained, without masked ones.

    Raises:
        QrloraError: what `add_adapter` raises of layers and ranks, or another form.
    """
    as_mixin(denoiser)
    check_new_name(denoiser, adapter_name)
    check_spec(spec)
    form = form_of(spec)
    if form.name not in (COEFFICIENTS, PLAIN_LORA):
        raise QrloraError(
            f"what a {form.name} adapter needs is not known before it is made; known are coefficients (of any basis) "
            "and plain LoRA."
        )
    layers, modules = target_layers(denoiser, spec.target_modules, spec.blocks), adaptable_layers(denoiser)
    side, starts, trained = form.side(spec), dict[str, Start](), dict[str, int]()
    header = Header(basis=spec.basis, side=side, mask=spec.mask, rank=spec.rank, lora_alpha=spec.rank * spec.scale)
    for layer in layers:
        check_adaptable(modules[layer], layer)
        weight = _blank_weight(modules[layer])
        limit = form.rank_limit(weight, spec, layer)
        if spec.rank > limit:
            raise QrloraError(
                f"{layer} has a weight of shape {list(weight.shape)} and allows a rank of at most {limit}, not "
                f"{spec.rank}; lower the rank or leave the layer out of target_modules."
            )
        starts[layer] = form.start(weight, spec, layer, _BlankBases())
        trained[layer] = form.trained_size(starts[layer].pair, {}, header if side is not None else None)
    masked = masked_factor(form, spec.mask, spec.side)
    record = Record(header, form.name)
    with torch.device("meta"):
        inject(denoiser, adapter_name, Injection(starts, form, spec.scale, form.frozen(spec.side), masked, record))
    return trained


def _blank_weight(module: nn.Module) -> Tensor:
    """Of the right shape, in no memory; not on the meta device, where forms expect no weight."""
    base = base_layer(module)
    if isinstance(base, nn.Linear):
        return torch.zeros(()).expand(base.out_features, base.in_features)
    assert isinstance(base, nn.Conv2d)
    return torch.zeros(()).expand(base.out_channels, base.in_channels, *base.kernel_size)
