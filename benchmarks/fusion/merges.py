"""A content and a style adapter into one, by the library's own methods."""

import warnings
from collections.abc import Sequence

from benchmarks.fusion.config import EXACT, ROLES, Merge
from benchmarks.fusion.schedule import Schedule, by_rule, by_timesteps
from qrlora.adapter import ALL_TIMESTEPS
from qrlora.errors import QrloraWarning
from qrlora.formats import Adapter
from qrlora.merging import merge, run_time_names, run_time_rule
from qrlora.models import LoadedModel


def merged(
    way: Merge, adapters: Sequence[Adapter], weights: Sequence[float], base: LoadedModel, prompts: Sequence[str]
) -> Adapter:
    """The merge; a weight of 0 leaves an adapter out. What the library warns of (norms, ranks) is measured here.

    Args:
        way: how.
        adapters: at least one.
        weights: one an adapter.
        base: what a method learns on that learns.
        prompts: what such a method draws with each adapter alone.
    """
    used = [each for each in zip(adapters, weights, prompts, strict=True) if each[1] != 0]
    parts, strengths = [adapter for adapter, _, _ in used], [weight for _, weight, _ in used]
    drawn = [prompt for _, _, prompt in used]
    # Adapters of other parts of the network have other layers: what both have is merged, the rest is kept.
    apart = len({frozenset(part.layers) for part in parts}) > 1
    method = "auto" if way.method == EXACT else way.method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QrloraWarning)
        return merge(
            parts,
            strengths,
            method,
            normalize=way.normalize,
            blocks=["all"] * len(parts) if apart else None,
            **way.options,
            **({"model": base, "prompts": drawn} if way.on_base else {}),
        )


def schedule_of(way: Merge, adapters: Sequence[Adapter]) -> Schedule | None:
    """Of a merge that is made while a picture is drawn; None where all adapters always act."""
    if way.timesteps:
        return by_timesteps([way.timesteps.get(role, ALL_TIMESTEPS) for role in ROLES])
    if way.method in run_time_names():
        return by_rule(run_time_rule(way.method, adapters, **way.options), len(adapters))
    return None
