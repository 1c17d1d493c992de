"""Adapters in, a report out."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from qrlora.analysis._base import BaseWeights
from qrlora.analysis._layerwise import Layerwise, Progress
from qrlora.analysis._names import short_names
from qrlora.analysis._random import Baselines
from qrlora.analysis._report import RandomSettings, Report
from qrlora.analysis._usage import ExpertUsage, report_usage
from qrlora.analysis._words import report_notes, strength_note, usage_notes
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter


def analyze(
    adapters: Sequence[Adapter],
    *,
    names: Sequence[str] | None = None,
    denoiser: nn.Module | None = None,
    usages: Sequence[ExpertUsage] = (),
    seed: int = 0,
    draws: int = 32,
    progress: Progress | None = None,
) -> Report:
    """What each adapter is, and how every two of them relate, beside what random matrices give.

    Args:
        adapters: one or more, of any tool, of one component; layer sets may differ. Companions are left out, which
            the report says.
        names: what the report calls them; `adapter_names` where None.
        denoiser: the base model, for `R = Q^T W`; without it R is left out, and the report says so.
        usages: recorded gate weights of gated adapters.
        seed: of the random baseline.
        draws: random pairs for each shape, at least 2.
        progress: called with (layers done, layers) after each layer.

    Returns:
        The report; `write_report` makes pages and pictures of it. Norms more than `NORM_RATIO_LIMIT` apart are also
        told in a `QrloraWarning`.

    Raises:
        QrloraError: nothing given, values that are not finite, two adapters without a common layer, another base model
            than a header says.
    """
    if not adapters:
        raise QrloraError("there is nothing to analyze; give at least one adapter.")
    if draws < 2:
        raise QrloraError(f"draws={draws} is too few for a mean and a deviation; give 2 or more.")
    named = _named(adapters, names)
    for name, adapter in named.items():
        _check_finite(name, adapter)
    base = BaseWeights(denoiser, named.values()) if denoiser is not None else None
    job = Layerwise(named, Baselines(seed, draws), base)
    job.run(progress)
    facts, pairs = job.facts(), job.pairs()
    for pair in pairs:
        unequal = strength_note(list(named), pair)
        if unequal is not None:
            warnings.warn(unequal, QrloraWarning, stacklevel=2)
    return Report(
        adapters=facts,
        pairs=pairs,
        random=RandomSettings(seed=seed, draws=draws),
        notes=[*report_notes(named, pairs, with_base=base is not None), *usage_notes(named, usages)],
        usage=report_usage(usages) if usages else None,
    )


def adapter_names(adapters: Sequence[Adapter]) -> list[str]:
    """What a report calls adapters: the shortest ends of their files' paths that tell them apart."""
    return short_names([adapter.source or f"adapter {index + 1}" for index, adapter in enumerate(adapters)])


def _named(adapters: Sequence[Adapter], names: Sequence[str] | None) -> dict[str, Adapter]:
    if names is None:
        names = adapter_names(adapters)
    if len(names) != len(adapters) or len(set(names)) != len(names):
        raise QrloraError(f"{len(adapters)} adapters need as many different names, not {', '.join(names)}.")
    return dict(zip(names, adapters, strict=True))


def _check_finite(name: str, adapter: Adapter) -> None:
    for layer, pair in adapter.layers.items():
        if not (bool(torch.isfinite(pair.A).all()) and bool(torch.isfinite(pair.B).all())):
            raise QrloraError(f"{name}: {layer} has values that are not finite (nan or inf); it cannot be analyzed.")
