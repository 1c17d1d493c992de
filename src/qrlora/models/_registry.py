"""Which model families there are, and which of them a model is of."""

from typing import Any

from qrlora.adapter import register_blocks, register_targets
from qrlora.errors import QrloraError
from qrlora.models._family import Family

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known by its denoiser's class, and tell the adapters what `target_modules="auto"` and the names
    of its blocks mean."""
    register_targets(family.denoiser_class, family.target_modules, family.idle_layers)
    for name, parts in family.blocks.items():
        register_blocks(name, *parts)
    _FAMILIES[family.name] = family
    return family


def family_names() -> tuple[str, ...]:
    """Names of the families known, sorted."""
    return tuple(sorted(_FAMILIES))


def families() -> tuple[Family, ...]:
    """The families known."""
    return tuple(_FAMILIES.values())


def family_of(model: Any) -> Family:
    """The family of a denoiser or of a pipeline, by class names.

    Raises:
        QrloraError: an unknown class; the sentence lists the known ones.
    """
    for family in _FAMILIES.values():
        if family.recognises(model):
            return family
    known = ", ".join(
        f"{name} ({family.denoiser_class} in {family.pipeline_class})" for name, family in sorted(_FAMILIES.items())
    )
    raise QrloraError(
        f"{type(model).__name__} belongs to no model family known here; the known ones are {known}. Adapters alone "
        "(qrlora.add_adapter with target_modules) work on other denoisers too."
    )
