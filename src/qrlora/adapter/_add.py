"""A new adapter on a denoiser."""

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qrlora.adapter._cache import BasisCache, layer_seed
from qrlora.adapter._peft import Factor, Injection, Record, as_mixin, check_new_name, inject, upper_triangle
from qrlora.adapter._spec import PLAIN_LORA, AdapterSpec
from qrlora.adapter._weights import check_adaptable, combined_hash, dense_weight, layer_hash
from qrlora.adapter.targets import adaptable_layers, target_layers
from qrlora.basis import as_matrix, basis_names, fingerprint, rank_limit
from qrlora.errors import QrloraError
from qrlora.formats import Header, LowRank


def add_adapter(
    denoiser: nn.Module,
    spec: AdapterSpec,
    adapter_name: str = "default",
    *,
    cache: BasisCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Put a new adapter on a denoiser, ready to train; it alone is active, others stay loaded.

    The base weights are not touched: `W' = W + scale * Q dR`, with `dR` zero at the start (QR-LoRA's `W_res + Q (R +
    dR)`). The adapter's weights are fp32 whatever the base's dtype; the basis is frozen through peft, so it stays
    frozen.

    Args:
        denoiser: a diffusers denoiser (transformer or U-Net), of any dtype peft's LoRA supports.
        spec: the kind of adapter.
        adapter_name: two or more letters, digits, - or _.
        cache: where bases are kept; the default folder where None.
        progress: called with (layers done, layers) after each layer.

    Returns:
        The adapted layers' paths, in the order of the model.

    Raises:
        QrloraError: an unknown basis, no matching layer, a layer that cannot be adapted, a rank above a layer's
            limit, a packed weight of unknown type, a name that is taken or unusable. The denoiser is then as it was.
    """
    as_mixin(denoiser)
    check_new_name(denoiser, adapter_name)
    if not spec.plain and spec.basis not in basis_names():
        raise QrloraError(
            f"basis {spec.basis!r} is not known; the known ones are {', '.join((*basis_names(), PLAIN_LORA))}."
        )
    layers = target_layers(denoiser, spec.target_modules)
    modules = adaptable_layers(denoiser)
    for layer in layers:
        check_adaptable(modules[layer], layer)
        _check_rank(dense_weight(modules[layer], layer), spec, layer)
    store = cache if cache is not None else BasisCache()
    factors: dict[str, LowRank] = {}
    hashes: dict[str, str] = {}
    for done, layer in enumerate(layers, start=1):
        weight = dense_weight(modules[layer], layer)
        factors[layer] = _start(weight, spec, layer, store)
        hashes[layer] = layer_hash(modules[layer], layer)
        if progress is not None:
            progress(done, len(layers))
    trained: Factor = "lora_A" if spec.side == "output" else "lora_B"
    frozen: tuple[Factor, ...] = () if spec.plain else ("lora_B",) if spec.side == "output" else ("lora_A",)
    record = Record(_header(spec, factors, hashes), spec)
    inject(
        denoiser,
        adapter_name,
        Injection(factors, spec.scale, frozen, trained if spec.mask == "upper" else None, record),
    )
    return layers


def _check_rank(weight: Tensor, spec: AdapterSpec, layer: str) -> None:
    limit = (
        min(as_matrix(weight, layer=layer).shape)
        if spec.plain
        else rank_limit(weight, spec.basis, side=spec.side, layer=layer)
    )
    if spec.rank > limit:
        raise QrloraError(
            f"{layer} has a weight of shape {list(weight.shape)} and allows a rank of at most {limit}, not "
            f"{spec.rank}; lower the rank or leave the layer out of target_modules."
        )


def _start(weight: Tensor, spec: AdapterSpec, layer: str, cache: BasisCache) -> LowRank:
    """The factors an adapter starts from, on the CPU, shaped as the layer's lora_B and lora_A."""
    out, inputs = as_matrix(weight, layer=layer).shape
    b_shape = (out, spec.rank, *(1 for _ in weight.shape[2:]))
    a_shape = (spec.rank, *weight.shape[1:])
    generator = torch.Generator().manual_seed(layer_seed(spec.seed, layer))
    if spec.plain:
        # peft's own start of lora_A: uniform within 1 / sqrt(fan_in).
        uniform = (torch.rand(a_shape, generator=generator) * 2 - 1) / math.sqrt(inputs)
        return LowRank(_coefficients(b_shape, spec, "lora_B", generator), uniform)
    vectors = cache.get(weight, spec, layer).vectors
    if spec.side == "output":
        return LowRank(vectors.reshape(b_shape), _coefficients(a_shape, spec, "lora_A", generator))
    return LowRank(_coefficients(b_shape, spec, "lora_B", generator), vectors.T.reshape(a_shape))


def _coefficients(shape: tuple[int, ...], spec: AdapterSpec, factor: Factor, generator: torch.Generator) -> Tensor:
    if spec.init == "zero":
        return torch.zeros(shape)
    drawn = torch.randn(shape, generator=generator) * spec.init_std
    return upper_triangle(drawn, factor) if spec.mask == "upper" else drawn


def _header(spec: AdapterSpec, factors: Mapping[str, LowRank], hashes: Mapping[str, str]) -> Header:
    return Header(
        basis=spec.basis,
        side=None if spec.plain else spec.side,
        mask=spec.mask,
        rank=spec.rank,
        lora_alpha=spec.rank * spec.scale,
        seed=spec.seed,
        fingerprint=None if spec.plain else _fingerprint(spec, factors),
        base_hash=combined_hash(hashes),
        weight_hashes=dict(hashes),
    )


def _fingerprint(spec: AdapterSpec, factors: Mapping[str, LowRank]) -> str:
    """One SHA-256 over the fingerprints `G^T Q` of all layers' bases, in the order of their names."""
    digest = hashlib.sha256()
    for layer in sorted(factors):
        pair = factors[layer]
        vectors = pair.B.flatten(1) if spec.side == "output" else pair.A.flatten(1).T
        digest.update(layer.encode() + fingerprint(vectors).contiguous().numpy().tobytes())
    return digest.hexdigest()
