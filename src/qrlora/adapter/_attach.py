"""An adapter read from a file, on a denoiser."""

import torch
from torch import Tensor, nn

from qrlora.adapter._cache import BasisCache
from qrlora.adapter._packed import keep_gradients
from qrlora.adapter._peft import (
    Injection,
    Record,
    active_adapters,
    as_mixin,
    check_new_name,
    component_of,
    inject,
    lora_layers,
    masked_factor,
)
from qrlora.adapter._spec import PLAIN_LORA, AdapterSpec
from qrlora.adapter._variant import OWN
from qrlora.adapter._weights import base_layer, check_adaptable, check_base, dense_weight
from qrlora.adapter.forms import Form, Start, form_named, form_names, form_of
from qrlora.adapter.forms._form import COEFFICIENTS, FACTORS, Factor, upper_triangle
from qrlora.adapter.targets import adaptable_layers
from qrlora.basis import align, is_orthonormal
from qrlora.errors import QrloraError
from qrlora.formats import TEXT_ENCODERS, Adapter, CoefficientsFile, Component, Header, LowRank, check_weight

FINGERPRINT_TOLERANCE = 1e-3


def attach_adapter(
    denoiser: nn.Module,
    adapter: Adapter,
    adapter_name: str,
    *,
    weight: float = 1.0,
    trainable: bool = False,
    spec: AdapterSpec | None = None,
    cache: BasisCache | None = None,
) -> list[str]:
    """Put an adapter on a denoiser, active beside those already active.

    Args:
        denoiser: of the base model the adapter was trained on; checked by its weights where the header has their
            hashes.
        adapter: as read by `read_adapter`, or merged.
        adapter_name: its name on the denoiser.
        weight: its strength; see `set_adapters`.
        trainable: train its coefficients further, its basis frozen and its mask kept. Otherwise all of it is frozen.
        spec: for training, the scale to train with (`lora_alpha`); what it says of the basis and the form must be what
            the adapter has. Forms other than coefficients and plain LoRA need it.
        cache: of bases, for forms that compute a frozen factor again to train further.

    Returns:
        The adapted layers' paths.

    Raises:
        QrloraError: another base model, a layer that is missing or of another shape, a name that is taken or
            unusable, a `spec` that contradicts the adapter; naming the layer. The denoiser is then as it was.
    """
    mixin = as_mixin(denoiser)
    check_new_name(denoiser, adapter_name)
    check_weight(weight)
    check_fits(denoiser, adapter)
    injection = _injection(denoiser, adapter, spec, cache) if trainable else _frozen(adapter)
    if trainable:
        keep_gradients(denoiser)
    before = active_adapters(denoiser)
    inject(denoiser, adapter_name, injection)
    mixin.set_adapter([*before, adapter_name])
    layers = lora_layers(denoiser, adapter_name)
    for layer in layers.values():
        layer.set_scale(adapter_name, weight)
    return list(layers)


def resolve_coefficients(file: CoefficientsFile, denoiser: nn.Module, *, cache: BasisCache | None = None) -> Adapter:
    """Rebuild a whole adapter from a coefficients-only file and the base model it was trained on.

    Each layer's basis is computed again and rotated within its span to the file's fingerprint (orthogonal Procrustes).

    Raises:
        QrloraError: a layer is missing or of another shape, another base model, or a fingerprint missed by more than
            1e-3 relative, naming the layer.
    """
    modules = adaptable_layers(denoiser)
    _check_layers(modules, list(file.layers), file.component, denoiser, file.source)
    check_base(modules, file.header.weight_hashes, file.source)
    store = cache if cache is not None else BasisCache()
    layers = {name: _resolved(file, name, modules[name], store) for name in file.layers}
    adapter = Adapter(layers, file.header, file.component, source=file.source)
    _check_shapes(modules, adapter)
    return adapter


def _resolved(file: CoefficientsFile, name: str, module: nn.Module, cache: BasisCache) -> LowRank:
    header, part = file.header, file.layers[name]
    if header.basis is None or header.side is None:
        raise QrloraError(f"{file.source} does not say which basis it needs.")
    weight = dense_weight(module, name)
    rank = part.fingerprint.shape[0]
    spec = AdapterSpec(rank=rank, basis=header.basis, side=header.side, band=header.band, seed=header.seed)
    computed = cache.get(weight, spec, name).vectors
    vectors, misfit = align(computed, part.fingerprint, orthonormal=is_orthonormal(header.basis))
    if not misfit <= FINGERPRINT_TOLERANCE:
        raise QrloraError(
            f"{file.source}: the basis of {name} cannot be found again on this base model (misfit "
            f"{misfit:.1e}, allowed {FINGERPRINT_TOLERANCE:.0e}); use the base model it was trained on, in the same "
            "precision, or a file with its basis."
        )
    ones = (1,) * (weight.ndim - 2)
    if header.side == "output":
        return LowRank(vectors.reshape(-1, rank, *ones), part.trained)
    return LowRank(part.trained, vectors.T.reshape(rank, *weight.shape[1:]))


def check_fits(denoiser: nn.Module, adapter: Adapter) -> None:
    """Refuse an adapter that `attach_adapter` would refuse for its layers or its base model; changes nothing.

    Raises:
        QrloraError: another base model, or a layer that is missing or of another shape, naming the layer.
    """
    modules = adaptable_layers(denoiser)
    _check_layers(modules, list(adapter.layers), adapter.component, denoiser, adapter.label)
    for layer in adapter.layers:
        check_adaptable(modules[layer], layer)
    _check_shapes(modules, adapter)
    if adapter.header is not None:
        check_base(modules, adapter.header.weight_hashes, adapter.label)


def check_form(adapter: Adapter) -> None:
    """Refuse an adapter that `attach_adapter` would refuse for its form; changes nothing.

    Raises:
        QrloraError: a form that is not known, or a layer whose tensors are not those of the form.
    """
    _starts(adapter, form_in(adapter))


def _check_layers(
    modules: dict[str, nn.Module], layers: list[str], component: Component, denoiser: nn.Module, label: str
) -> None:
    wanted, has = (TEXT_ENCODERS[0] if each in TEXT_ENCODERS else each for each in (component, component_of(denoiser)))
    if wanted != has:
        raise QrloraError(f"{label} adapts a {component}, but {type(denoiser).__name__} is a {has}.")
    for layer in layers:
        if layer not in modules:
            raise QrloraError(
                f"{label} adapts {layer}, which {type(denoiser).__name__} does not have; load the model it "
                "was trained on."
            )


def _check_shapes(modules: dict[str, nn.Module], adapter: Adapter) -> None:
    for layer, pair in adapter.shapes.items():
        shape = _shape(base_layer(modules[layer]))
        if pair.shape != shape:
            raise QrloraError(
                f"{adapter.label} adapts {layer} as a weight of shape {list(pair.shape)}, but here it has "
                f"{list(shape)}; load the model it was trained on."
            )


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of the unpacked weight: a quantised one may be stored in another shape."""
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels, *module.kernel_size)
    assert isinstance(module, nn.Linear)
    return (module.out_features, module.in_features)


def form_in(adapter: Adapter) -> Form:
    """What a file is: what its header says, else coefficients where it has a basis, else plain LoRA."""
    header = adapter.header
    if adapter.form is not None:
        if adapter.form not in form_names():
            raise QrloraError(
                f"{adapter.label} is of the form {adapter.form!r}, and known are {', '.join(form_names())}; a newer "
                "qrlora may have made it."
            )
        return form_named(adapter.form)
    return form_named(COEFFICIENTS if header is not None and header.side is not None else PLAIN_LORA)


def ranks_of(adapter: Adapter) -> set[int]:
    """The ranks of its layers as `AdapterSpec.rank` means them; a form's file may hold a pair of another rank."""
    form = form_in(adapter)
    return {form.rank(pair) for pair in adapter.layers.values()}


def trained_size(adapter: Adapter) -> int:
    """How many numbers an adapter and its companions train, without masked ones."""
    total = 0
    for part in adapter.components.values():
        form = form_in(part)
        total += sum(form.trained_size(pair, part.own.get(name, {}), part.header) for name, pair in part.layers.items())
    return total


def _frozen(adapter: Adapter) -> Injection:
    """Nothing trained: a low-rank form is there as its pair, any other as itself."""
    form = form_in(adapter)
    starts = _starts(adapter, form)
    if form.low_rank:
        form = form_named(PLAIN_LORA)
    return Injection(starts, form, 1.0, (*FACTORS, OWN), None, Record(adapter.header, form.name))


def _starts(adapter: Adapter, form: Form) -> dict[str, Start]:
    starts = {name: Start(pair, adapter.own.get(name, {})) for name, pair in adapter.layers.items()}
    for name, start in starts.items():
        form.check_saved(start, f"{adapter.label}: {name}")
    return starts


def _injection(denoiser: nn.Module, adapter: Adapter, spec: AdapterSpec | None, cache: BasisCache | None) -> Injection:
    header, form = adapter.header, form_in(adapter)
    if spec is not None:
        _check_spec(adapter, form, spec)
    elif form.names_itself:
        raise QrloraError(
            f"{adapter.label} is a {form.name} adapter, which needs the spec it was made with to be trained further."
        )
    side = header.side if header is not None else None
    mask = spec.mask if spec is not None else header.mask if header is not None else "full"
    masked = masked_factor(form, mask, side)
    for name, pair in adapter.layers.items():
        if masked is not None:
            _check_upper(adapter, name, pair.A if masked == "lora_A" else pair.B, masked)
    starts = _starts(adapter, form)
    if spec is not None:
        modules, store = adaptable_layers(denoiser), cache if cache is not None else BasisCache()
        for name, start in starts.items():
            starts[name] = form.resume(start, dense_weight(modules[name], name), spec, name, store)
    if header is not None and spec is not None:
        header = header.model_copy(update={"mask": mask, "lora_alpha": spec.rank * spec.scale})
    scale = spec.scale if spec is not None else 1.0
    return Injection(starts, form, scale, form.frozen(side), masked, Record(header, form.name))


def _check_upper(adapter: Adapter, name: str, trained: Tensor, factor: Factor) -> None:
    if not torch.equal(upper_triangle(trained, factor), trained):
        raise QrloraError(f'{adapter.label}: {name} has values outside the upper triangle; train it with mask="full".')


def _check_spec(adapter: Adapter, form: Form, spec: AdapterSpec) -> None:
    wanted = form_of(spec)
    if wanted is not form and {wanted.name, form.name} != {COEFFICIENTS, PLAIN_LORA}:
        raise QrloraError(
            f"{adapter.label} is a {form.name} adapter, but form {wanted.name!r} is asked for; train it as it is."
        )
    header = adapter.header if adapter.header is not None else Header(rank=1)
    if header.band != spec.band:
        raise QrloraError(
            f"{adapter.label} has the band {header.band}, but {spec.band} is asked for; train it as it is."
        )
    has = (header.basis or PLAIN_LORA, header.side)
    wants = (spec.basis, wanted.side(spec))
    if has != wants:
        raise QrloraError(
            f"{adapter.label} has the basis {has[0]!r} on side {has[1]}, but {wants[0]!r} on side {wants[1]} "
            "is asked for; train it as it is."
        )
    for name, pair in adapter.layers.items():
        rank = form.rank(pair)
        if rank != spec.rank:
            raise QrloraError(
                f"{adapter.label} has rank {rank} at {name}, but rank {spec.rank} is asked for; train it as it is."
            )
