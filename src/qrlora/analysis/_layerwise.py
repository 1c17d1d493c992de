"""Layer by layer through some adapters: the facts of each and the comparison of every two."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean, pstdev

from torch import Tensor

from qrlora.analysis._base import BaseWeights
from qrlora.analysis._measure import Kind, Measured, measure_angles, measure_parts, named_parts, share_basis
from qrlora.analysis._names import model_order
from qrlora.analysis._random import Baselines, Chance, Shapes
from qrlora.analysis._report import AdapterFacts, LayerFacts, LayerPair, Measure, Pair, Total
from qrlora.analysis._spaces import Factors, effective_rank, update_cosine, update_space
from qrlora.analysis._words import pair_notes
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, Header, LowRank
from qrlora.merging import check_compatible, norm_ratio

DIGITS = 7
GATE_WEIGHT = "gate_weight"
Progress = Callable[[int, int], None]


class _Layer:
    """One adapter's layer, decomposed once for all pairs."""

    def __init__(self, pair: LowRank, header: Header | None, gate: Tensor | None) -> None:
        side = header.side if header is not None else None
        masked = side is not None and header is not None and header.mask == "upper"
        self.shape, self.kind = pair.shape, Kind(pair.rank, side, masked)
        self.factors = Factors.of(pair)
        self.space = update_space(self.factors)
        self.norm = float(self.space.spectrum.norm())
        self.gate = gate.double().T if gate is not None else None

    @classmethod
    def of(cls, adapter: Adapter, layer: str) -> "_Layer":
        return cls(adapter.layers[layer], adapter.header, adapter.own.get(layer, {}).get(GATE_WEIGHT))


class Layerwise:
    """Layer by layer through all adapters, so that only one layer's decompositions are held at a time."""

    def __init__(self, adapters: Mapping[str, Adapter], baselines: Baselines, base: BaseWeights | None) -> None:
        self.adapters, self.baselines, self.base = adapters, baselines, base
        self.names, self.parts = list(adapters), list(adapters.values())
        self.layer_facts: list[list[LayerFacts]] = [[] for _ in self.parts]
        self.found: dict[tuple[int, int], list[tuple[LayerPair, Measured]]] = {
            pair: [] for pair in combinations(range(len(self.parts)), 2)
        }
        for first, second in self.found:
            self._check_common(first, second)

    def _check_common(self, first: int, second: int) -> None:
        one, two = self.parts[first].layers, self.parts[second].layers
        if not any(layer in two and two[layer].shape == one[layer].shape for layer in one):
            raise QrloraError(
                f"{self.names[first]} and {self.names[second]} have no layer in common (one adapts {next(iter(one))}, "
                f"the other {next(iter(two))}), so they belong to different models."
            )

    def run(self, progress: Progress | None) -> None:
        layers = model_order(list(dict.fromkeys(layer for adapter in self.parts for layer in adapter.layers)))
        for done, layer in enumerate(layers, start=1):
            held = {
                index: _Layer.of(adapter, layer) for index, adapter in enumerate(self.parts) if layer in adapter.layers
            }
            for index, one in held.items():
                self.layer_facts[index].append(_layer_facts(layer, one))
            for first, second in combinations(held, 2):
                if held[first].shape == held[second].shape:
                    self.found[first, second].append(self._compare(layer, held[first], held[second]))
            if progress is not None:
                progress(done, len(layers))

    def facts(self) -> list[AdapterFacts]:
        return [_facts(*entry, layers) for entry, layers in zip(self.adapters.items(), self.layer_facts, strict=True)]

    def pairs(self) -> list[Pair]:
        return [self._pair(first, second) for first, second in self.found]

    def _pair(self, first: int, second: int) -> Pair:
        one, two = self.parts[first].layers, self.parts[second].layers
        layers = [entry for entry, _ in self.found[first, second]]
        norms = _total_norm(layers, 0), _total_norm(layers, 1)
        refusal = self._refusal(first, second)
        both = model_order([layer for layer in one if layer in two])
        pair = Pair(
            first=first,
            second=second,
            norms=norms,
            mergeable=refusal is None,
            norm_ratio=norm_ratio(norms),
            total=_totals(layers, [measured for _, measured in self.found[first, second]]),
            layers=layers,
            only_first=model_order([layer for layer in one if layer not in two]),
            only_second=model_order([layer for layer in two if layer not in one]),
            other_shape=[layer for layer in both if one[layer].shape != two[layer].shape],
            notes=[],
        )
        return pair.model_copy(update={"notes": pair_notes(self.names, pair, refusal)})

    def _refusal(self, first: int, second: int) -> str | None:
        """Why merge does not take two adapters, by the names they have here."""
        try:
            check_compatible([replace(self.parts[index], source=self.names[index]) for index in (first, second)])
        except QrloraError as error:
            return str(error)
        return None

    def _compare(self, layer: str, one: _Layer, two: _Layer) -> tuple[LayerPair, Measured]:
        parts = named_parts(one.factors, one.kind, two.kind), named_parts(two.factors, two.kind, one.kind)
        shared = share_basis(*parts)
        if self.base is not None and "Q" in parts[0] and one.kind.side is not None:
            for part, each in zip(parts, (one, two), strict=True):
                part["R"] = self.base.coefficients(layer, each.factors, one.kind.side)
        experts = 0
        if one.gate is not None and two.gate is not None and one.gate.shape == two.gate.shape:
            parts[0]["gate"], parts[1]["gate"] = one.gate, two.gate
            experts = one.gate.shape[1]
        measured = measure_parts(*parts, one.kind.masked and two.kind.masked)
        measured.add("update.cosine", update_cosine(one.factors, two.factors))
        measured.sizes["update.cosine"] = one.norm, two.norm
        output_angles, output = measure_angles("output", one.space.output, two.space.output)
        input_angles, inputs = measure_angles("input", one.space.input, two.space.input)
        values = measured.values | output.values | inputs.values
        shapes = Shapes(
            out=one.factors.output.shape[0],
            inputs=one.factors.input.shape[0],
            kinds=(one.kind, two.kind),
            directions=(one.space.output.shape[1], two.space.output.shape[1]),
            shared=shared,
            experts=experts,
        )
        chances = self.baselines.of(shapes)
        entry = LayerPair(
            layer=layer,
            shape=one.shape,
            ranks=(one.kind.rank, two.kind.rank),
            shared_basis=shared,
            norms=(_rounded(one.norm), _rounded(two.norm)),
            measures={name: _measure(value, chances.get(name)) for name, value in sorted(values.items())},
            output_angles=[_rounded(angle) for angle in output_angles],
            input_angles=[_rounded(angle) for angle in input_angles],
        )
        return entry, measured


def _layer_facts(layer: str, one: _Layer) -> LayerFacts:
    return LayerFacts(
        layer=layer,
        shape=one.shape,
        rank=one.kind.rank,
        norm=_rounded(one.norm),
        effective_rank=_rounded(effective_rank(one.space.spectrum)),
        spectrum=[_rounded(value) for value in one.space.spectrum.tolist()],
    )


def _facts(name: str, adapter: Adapter, layers: list[LayerFacts]) -> AdapterFacts:
    header = adapter.header
    return AdapterFacts(
        name=name,
        file=adapter.source and adapter.source.encode("utf-8", "backslashreplace").decode(),
        component=adapter.component,
        basis=header.basis if header is not None else None,
        side=header.side if header is not None else None,
        mask=header.mask if header is not None else "full",
        base_model=header.base_model if header is not None else None,
        trigger_words=header.trigger_words if header is not None else [],
        rank=max(entry.rank for entry in layers),
        norm=_rounded(math.hypot(*(entry.norm for entry in layers))),
        layers=layers,
    )


def _total_norm(layers: Sequence[LayerPair], which: int) -> float:
    return _rounded(math.hypot(*(entry.norms[which] for entry in layers)))


def _totals(layers: Sequence[LayerPair], measured: Sequence[Measured]) -> dict[str, Total]:
    names = sorted({name for entry in layers for name in entry.measures})
    return {name: _total(name, layers, measured) for name in names}


def _total(name: str, layers: Sequence[LayerPair], measured: Sequence[Measured]) -> Total:
    """One measure of the whole adapter; cosines weighted by the norms, so that they are those of one long vector."""
    held = [
        (entry.measures[name], one.sizes.get(name))
        for entry, one in zip(layers, measured, strict=True)
        if name in entry.measures
    ]
    values = [measure.value for measure, _ in held]
    if all(sizes is not None for _, sizes in held):
        products = [sizes[0] * sizes[1] for _, sizes in held if sizes is not None]
        whole = math.prod(
            math.hypot(*(one.sizes[name][which] for one in measured if name in one.sizes)) for which in (0, 1)
        )
        shares = [product / whole for product in products]
    else:
        shares = [1 / len(values)] * len(values)
    random = [(measure.random_mean, measure.random_std) for measure, _ in held]
    known = [(mean, std) for mean, std in random if mean is not None and std is not None]
    complete = len(known) == len(held)
    return Total(
        value=_rounded(_dot(shares, values)),
        random_mean=_rounded(_dot(shares, [mean for mean, _ in known])) if complete else None,
        random_std=_rounded(math.hypot(*(share * std for share, (_, std) in zip(shares, known, strict=True))))
        if complete
        else None,
        mean=_rounded(fmean(values)),
        std=_rounded(pstdev(values)),
        min=min(values),
        max=max(values),
        layers=len(values),
    )


def _dot(shares: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(share * value for share, value in zip(shares, values, strict=True))


def _measure(value: float, chance: Chance | None) -> Measure:
    return Measure(
        value=_rounded(value),
        random_mean=_rounded(chance.mean) if chance is not None else None,
        random_std=_rounded(chance.std) if chance is not None else None,
    )


def _rounded(value: float) -> float:
    """To the digits that mean something, so that the JSON stays small."""
    return float(f"{value:.{DIGITS}g}")
