"""Settings as nested mappings, before they are a configuration."""

from collections.abc import Mapping
from typing import Any


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys (`adapter.rank`) as sections."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, rest = str(key).partition(".")
        if rest:
            value = nest({rest: value})
        elif isinstance(value, Mapping):
            value = nest(value)
        nested = overlay(nested, {section: value})
    return nested


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both nested mappings, `above` where they differ."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = overlay(merged[key], value) if both else value
    return merged
