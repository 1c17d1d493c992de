"""Adapters with companions on a whole pipeline: its denoiser and its text encoders at once."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from qrlora.adapter._attach import attach_adapter, check_fits, check_form
from qrlora.adapter._control import adapters_disabled, remove_adapter, set_adapters
from qrlora.adapter._export import adapter_of
from qrlora.adapter._peft import active_adapters, as_mixin, check_new_name, configs
from qrlora.errors import QrloraError
from qrlora.formats import DENOISERS, TEXT_ENCODERS, Adapter, Component, check_weight


def attach_to_pipeline(
    pipeline: Any, adapter: Adapter, adapter_name: str, *, weight: float = 1.0
) -> dict[Component, list[str]]:
    """Put an adapter on a pipeline's denoiser and its companions on the text encoders, all under one name.

    Args:
        pipeline: a diffusers pipeline of the base model the adapter was trained on.
        adapter: as read by `read_adapter`, or merged.
        adapter_name: its name on every component, new on all of the pipeline.
        weight: its strength; see `set_pipeline_adapters`.

    Returns:
        The adapted layers' paths by component.

    Raises:
        QrloraError: what `attach_adapter` raises, or a text encoder that the pipeline does not have. The pipeline is
            then as it was.
    """
    check_weight(weight)
    check_fits_pipeline(pipeline, adapter)
    modules = {component: _component(pipeline, component, adapter.label) for component in adapter.components}
    for module in _carriers(pipeline).values():
        check_new_name(module, adapter_name)
    before = {module: active_adapters(module) for module in modules.values()}
    try:
        return {
            component: attach_adapter(modules[component], part, adapter_name, weight=weight)
            for component, part in adapter.components.items()
        }
    except BaseException:
        for module, active in before.items():
            if adapter_name in configs(module):
                as_mixin(module).delete_adapters(adapter_name)
            if configs(module):
                as_mixin(module).set_adapter(active)
        raise


def check_fits_pipeline(pipeline: Any, adapter: Adapter) -> None:
    """Refuse what `attach_to_pipeline` would refuse for its layers, its base model or its form; changes nothing.

    Raises:
        QrloraError: see `check_fits`; a form that is not known or damaged; or a text encoder that the pipeline does not
            have.
    """
    for component, part in adapter.components.items():
        check_fits(_component(pipeline, component, adapter.label), part)
        check_form(part)


def set_pipeline_adapters(pipeline: Any, weights: Mapping[str, float]) -> None:
    """Make these adapters active, at these weights, on every component that carries them, and no others.

    A weight scales the whole update of an adapter and of its companions. Without any weights the pipeline is the base
    model, bit for bit.

    Args:
        pipeline: one that adapters were attached to.
        weights: by name.

    Raises:
        QrloraError: an unknown name, or a weight that is not finite.
    """
    carriers = _carriers(pipeline)
    _check_known(carriers, weights)
    for module in carriers.values():
        own = {name: weight for name, weight in weights.items() if name in configs(module)}
        if own:
            set_adapters(module, own)
        elif configs(module):
            as_mixin(module).set_adapter([])


@contextmanager
def pipeline_adapters_disabled(pipeline: Any) -> Generator[None]:
    """Within this context the pipeline is its base model, bit for bit; afterwards adapters are as they were."""
    with ExitStack() as stack:
        for module in _carriers(pipeline).values():
            stack.enter_context(adapters_disabled(module))
        yield


def remove_from_pipeline(pipeline: Any, adapter_name: str) -> None:
    """Take an adapter off every component that carries it; others stay active or inactive as they were.

    Raises:
        QrloraError: no such adapter.
    """
    carriers = _carriers(pipeline)
    _check_known(carriers, [adapter_name])
    for module in carriers.values():
        if adapter_name in configs(module):
            remove_adapter(module, adapter_name)


def adapter_of_pipeline(
    pipeline: Any,
    adapter_name: str,
    *,
    base_model: str | None = None,
    trigger_words: Iterable[str] = (),
    training: Mapping[str, Any] | None = None,
) -> Adapter:
    """Copy an adapter off a pipeline, with those of its text encoders as companions; see `adapter_of`.

    Raises:
        QrloraError: no component carries it, or what `adapter_of` raises.
    """
    carriers = _carriers(pipeline)
    _check_known(carriers, [adapter_name])
    words = list(trigger_words)
    parts: dict[Component, Adapter] = {}
    for component, module in carriers.items():
        if adapter_name in configs(module):
            # The record of the training stands in the first header alone.
            told = None if parts else training
            part = adapter_of(module, adapter_name, base_model=base_model, trigger_words=words, training=told)
            parts[component] = replace(part, component=component)
    first, *rest = parts.values()
    return replace(first, companions={each.component: each for each in rest})


@contextmanager
def adapters_set_aside(pipeline: Any) -> Generator[None]:
    """Within this context no adapter acts but those made active in it; afterwards those that acted before do again.

    Components may leave the pipeline in between.
    """
    carriers = {module: active_adapters(module) for module in _carriers(pipeline).values() if configs(module)}
    for module in carriers:
        as_mixin(module).set_adapter([])
    try:
        yield
    finally:
        for module, active in carriers.items():
            as_mixin(module).set_adapter([name for name in active if name in configs(module)])


def pipeline_adapter_names(pipeline: Any) -> tuple[str, ...]:
    """The adapters that any component carries."""
    return tuple(dict.fromkeys(name for module in _carriers(pipeline).values() for name in configs(module)))


def text_encoders_with(pipeline: Any, adapter_names: Iterable[str]) -> tuple[str, ...]:
    """Those of some attached adapters that change how prompts are encoded."""
    carriers = _carriers(pipeline)
    encoders = [module for component, module in carriers.items() if component in TEXT_ENCODERS]
    return tuple(name for name in adapter_names if any(name in configs(module) for module in encoders))


def denoisers_with(pipeline: Any, adapter_names: Iterable[str]) -> tuple[str, ...]:
    """Those of some attached adapters that are on the denoiser."""
    denoisers = [module for component, module in _carriers(pipeline).items() if component in DENOISERS]
    return tuple(name for name in adapter_names if any(name in configs(module) for module in denoisers))


def _carriers(pipeline: Any) -> dict[Component, nn.Module]:
    """The components that are there and may carry adapters, the denoiser first."""
    found: dict[Component, Any] = {
        component: getattr(pipeline, component, None) for component in (*DENOISERS, *TEXT_ENCODERS)
    }
    return {component: module for component, module in found.items() if isinstance(module, nn.Module)}


def _component(pipeline: Any, component: Component, label: str) -> nn.Module:
    carriers = _carriers(pipeline)
    if component in carriers:
        return carriers[component]
    denoiser = next((module for name, module in carriers.items() if name in DENOISERS), None)
    if component in DENOISERS and denoiser is not None:
        return denoiser  # that it is of another kind is told by whoever looks at its layers
    raise QrloraError(f"{label} adapts the {component}, which this {type(pipeline).__name__} does not have (any more).")


def _check_known(carriers: Mapping[Component, nn.Module], names: Iterable[str]) -> None:
    known = dict.fromkeys(name for module in carriers.values() for name in configs(module))
    for name in names:
        if name not in known:
            raise QrloraError(f"there is no adapter {name!r} on the pipeline; there are: {', '.join(known) or 'none'}.")
