"""A new adapter on a denoiser."""

import hashlib
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from qrlora.adapter._cache import BasisCache
from qrlora.adapter._packed import keep_gradients
from qrlora.adapter._parallel import by_layer
from qrlora.adapter._peft import Injection, Record, as_mixin, check_new_name, component_of, inject, masked_factor
from qrlora.adapter._spec import PLAIN_LORA, AdapterSpec
from qrlora.adapter._weights import base_layer, base_weight, check_adaptable, combined_hash, dense_weight, layer_hash
from qrlora.adapter.forms import Form, Start, form_of
from qrlora.adapter.forms._form import COEFFICIENTS, check_spec
from qrlora.adapter.targets import adaptable_layers, target_layers
from qrlora.basis import Side, fingerprint
from qrlora.errors import QrloraError
from qrlora.formats import TEXT_ENCODERS, Header, basis_vectors


def add_adapter(
    denoiser: nn.Module,
    spec: AdapterSpec,
    adapter_name: str = "default",
    *,
    cache: BasisCache | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | None = None,
) -> list[str]:
    """Put a new adapter on a denoiser, ready to train; it alone is active, others stay loaded.

    The base weights are not touched, and the adapter starts from exactly the base model, whatever its form: by default
    `W' = W + scale * Q dR`, with `dR` zero at the start (QR-LoRA's `W_res + Q (R + dR)`). The adapter's weights are
    fp32 whatever the base's dtype; what is frozen is frozen through peft, so it stays frozen.

    Args:
        denoiser: a diffusers denoiser (transformer or U-Net), of any dtype peft's LoRA supports.
        spec: the kind of adapter.
        adapter_name: two or more letters, digits, - or _.
        cache: where bases are kept; the default folder where None.
        progress: called with (layers done, layers) after each layer.
        device: where bases are computed; where each weight is, where None.

    Returns:
        The adapted layers' paths, in the order of the model.

    Raises:
        QrloraError: an unknown basis or form, a combination without meaning, no matching layer, a layer that cannot be
            adapted, a rank above a layer's limit, a packed weight of unknown type, a name that is taken or unusable.
            The denoiser is then as it was.
    """
    as_mixin(denoiser)
    check_new_name(denoiser, adapter_name)
    layers = check_addable(denoiser, spec)
    form, modules = form_of(spec), adaptable_layers(denoiser)
    keep_gradients(denoiser)
    store = cache if cache is not None else BasisCache()
    starts: dict[str, Start] = {}
    hashes: dict[str, str] = {}

    def started(layer: str) -> tuple[Start, str]:
        weight = dense_weight(modules[layer], layer)
        start = form.start(weight if device is None else weight.to(device), spec, layer, store)
        return start, layer_hash(modules[layer], layer, weight)

    where = device or base_weight(modules[layers[0]]).device
    made = by_layer(started, layers, at_once=None if where.type == "cpu" else 1)
    for done, (layer, (start, hashed)) in enumerate(zip(layers, made, strict=True), start=1):
        starts[layer], hashes[layer] = start, hashed
        if progress is not None:
            progress(done, len(layers))
    inject(
        denoiser,
        adapter_name,
        Injection(
            starts,
            form,
            scale=spec.scale,
            frozen=form.frozen(spec.side),
            masked=masked_factor(form, spec.mask, spec.side),
            record=Record(_header(spec, form, starts, hashes), form.name),
        ),
    )
    return layers


def check_addable(denoiser: nn.Module, spec: AdapterSpec) -> list[str]:
    """Refuse what `add_adapter` would refuse whatever the adapter's name; changes nothing.

    Returns:
        The paths of the layers that would be adapted.

    Raises:
        QrloraError: as said there.
    """
    check_spec(spec)
    if component_of(denoiser) in TEXT_ENCODERS:
        check_encoder_spec(spec)
    layers, modules = target_layers(denoiser, spec.target_modules, spec.blocks), adaptable_layers(denoiser)
    for layer in layers:
        check_adaptable(modules[layer], layer)
        _check_rank(dense_weight(modules[layer], layer), spec, form_of(spec), layer)
    return layers


def compute_bases(
    denoiser: nn.Module,
    spec: AdapterSpec,
    share: tuple[int, int],
    *,
    cache: BasisCache | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | None = None,
) -> None:
    """Compute the bases of a share of the layers, so that `add_adapter` finds them in the cache.

    Large layers and small ones are dealt out evenly. Which process computes a basis does not change it.

    Args:
        denoiser: as for `add_adapter`.
        spec: likewise.
        share: index of the share, and how many there are.
        cache: one that the others read too, or they compute for themselves.
        progress: called with (layers done, layers of the share) after each layer.
        device: where to compute; where each weight is, where None.

    Raises:
        QrloraError: what `check_addable` raises.
    """
    layers, modules, (index, count) = check_addable(denoiser, spec), adaptable_layers(denoiser), share
    store = cache if cache is not None else BasisCache()
    sizes = {layer: cast(Tensor, base_layer(modules[layer]).weight).numel() for layer in layers}
    own = sorted(layers, key=lambda layer: -sizes[layer])[index::count]
    for done, layer in enumerate(own, start=1):
        weight = dense_weight(modules[layer], layer)
        form_of(spec).start(weight if device is None else weight.to(device), spec, layer, store)
        if progress is not None:
            progress(done, len(own))


def check_encoder_spec(spec: AdapterSpec) -> None:
    """Refuse a form that files do not hold for text encoders.

    Raises:
        QrloraError: begins with "form".
    """
    form = form_of(spec)
    if form.name not in (COEFFICIENTS, PLAIN_LORA):
        raise QrloraError(
            f"form={form.name!r} is for denoisers; text encoders take plain LoRA and coefficients on a basis."
        )


def _check_rank(weight: Tensor, spec: AdapterSpec, form: Form, layer: str) -> None:
    limit = form.rank_limit(weight, spec, layer)
    if spec.rank > limit:
        each = f" in each of {spec.bands} bands" if spec.bands > 1 else ""
        raise QrloraError(
            f"{layer} has a weight of shape {list(weight.shape)} and allows a rank of at most {limit}{each}, not "
            f"{spec.rank}; lower the rank or leave the layer out of target_modules."
        )


def _header(spec: AdapterSpec, form: Form, starts: Mapping[str, Start], hashes: Mapping[str, str]) -> Header:
    side = form.side(spec)
    return Header(
        basis=spec.basis,
        side=side,
        band=spec.band,
        mask=spec.mask,
        form=form.name if form.names_itself else None,
        rank=spec.rank,
        lora_alpha=spec.rank * spec.scale,
        seed=spec.seed,
        fingerprint=None if side is None else _fingerprint(side, starts),
        base_hash=combined_hash(hashes),
        weight_hashes=dict(hashes),
    )


def _fingerprint(side: Side, starts: Mapping[str, Start]) -> str:
    """One SHA-256 over the fingerprints `G^T Q` of all layers' bases, in the order of their names."""
    digest = hashlib.sha256()
    for layer in sorted(starts):
        vectors = basis_vectors(starts[layer].pair.B, starts[layer].pair.A, side)
        digest.update(layer.encode() + fingerprint(vectors).contiguous().numpy().tobytes())
    return digest.hexdigest()
