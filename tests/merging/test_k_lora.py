"""K-LoRA's rule against its equations, dense in float64, and pictures with it against switching by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qrlora.adapter import AdapterSpec, adapter_of, adapters_by_choice, adapters_disabled, add_adapter, set_adapters
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank
from qrlora.merging import KLora, adapters_by_rule, k_lora, merge, merge_names, run_time_names, run_time_rule
from qrlora.merging.methods import k_lora as module
from tests.adapter.test_add_adapter import shake, spec_for
from tests.adapters_of_data import CONV, LINEAR, dense, made
from tests.tiny_models import TARGETS, inputs, output, tiny

KINDS = {
    "one basis": lambda: [made(0), made(1)],
    "input side": lambda: [made(0, side="input"), made(1, side="input")],
    "plain and basis": lambda: [made(0, header=False, side=None), made(1, basis_seed=30, rank=2)],
}


def largest(matrix: Tensor, count: int) -> float:
    return float(matrix.abs().flatten().sort(descending=True).values[:count].sum())


def expected(parts: list[Adapter], values: Any = dense) -> dict[str, float]:
    """`C / (gamma S)`, gamma being the mean ratio of the sums (two layers cannot have an outlier of three means)."""
    ratios = [
        float(values(parts[0], layer).abs().sum() / values(parts[1], layer).abs().sum()) for layer in (LINEAR, CONV)
    ]
    gamma = sum(ratios) / 2
    found = {}
    for layer in (LINEAR, CONV):
        count = parts[0].layers[layer].rank * parts[1].layers[layer].rank
        tops = [largest(values(part, layer), count) for part in parts]
        found[layer] = tops[0] / (gamma * tops[1])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [2**22, 50])
def test_thresholds_are_the_dense_ones(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    parts = KINDS[kind]()
    rule = k_lora(parts)
    assert dict(rule.thresholds) == pytest.approx(expected(parts), rel=1e-5)
    # Strengths do not change the choice.
    assert dict(k_lora([parts[0].scaled(-3.0), parts[1]]).thresholds) == pytest.approx(dict(rule.thresholds), rel=1e-5)


@pytest.mark.parametrize("kind", ["one basis", "input side"])
def test_coefficients_as_scores(kind: str) -> None:
    parts = KINDS[kind]()
    factor = "A" if kind == "one basis" else "B"

    def trained(adapter: Adapter, layer: str) -> Tensor:
        return getattr(adapter.layers[layer], factor).double()

    assert dict(k_lora(parts, score="coefficients").thresholds) == pytest.approx(expected(parts, trained), rel=1e-6)
    with pytest.raises(QrloraError, match=r"score=coefficients needs one basis, but .* differ.* leave score at update"):
        k_lora([made(0), made(1, basis_seed=30)], score="coefficients")


def test_outliers_are_left_out_of_the_balance() -> None:
    def layers(scales: list[float]) -> Adapter:
        return Adapter({f"l{i}": LowRank(torch.ones(2, 1), scale * torch.ones(1, 3)) for i, scale in enumerate(scales)})

    content, style = layers([1.0, 2.0, 1.0, 2.0, 1.0, 100.0]), layers([1.0] * 6)
    # The mean is 107 / 6 = 17.8, and 100 is more than three of it; without it the mean is 7 / 5.
    assert dict(k_lora([content, style]).thresholds) == pytest.approx(
        {f"l{i}": value / 1.4 for i, value in enumerate([1.0, 2.0, 1.0, 2.0, 1.0, 100.0])}
    )


def test_layers_where_one_has_nothing() -> None:
    content, style = made(0), made(1)
    empty = {LINEAR: LowRank(style.layers[LINEAR].B, 0 * style.layers[LINEAR].A)}
    rule = k_lora([content, replace(style, layers={**style.layers, **empty})])
    assert rule.thresholds[LINEAR] == math.inf
    assert 0 < rule.thresholds[CONV] < math.inf
    rule = k_lora([replace(style, layers={**style.layers, **empty}), content])
    assert rule.thresholds[LINEAR] == 0.0
    assert set(rule.acting(LINEAR, 0.5)) == {1}
    rule = k_lora([replace(content, layers={LINEAR: content.layers[LINEAR]}), style])
    assert list(rule.thresholds) == [LINEAR]
    assert set(rule.acting(CONV, 0.5)) == {0, 1}


@settings(max_examples=30, deadline=None)
@given(progress=st.floats(0, 1), threshold=st.floats(0, 3), alpha=st.floats(0.5, 3), beta=st.floats(-1, 1))
def test_content_where_its_score_is_the_larger(progress: float, threshold: float, alpha: float, beta: float) -> None:
    """The published comparison, `C / gamma > S f(p)`, with S = 1."""
    for scale, factor in (("s", alpha * progress + beta), ("s*", math.fmod(alpha * progress + 0.85 * alpha, alpha))):
        rule = KLora({"layer": threshold}, scale, alpha, beta)  # type: ignore[arg-type]
        assert rule.factor(progress) == pytest.approx(factor, abs=1e-12)
        assert set(rule.acting("layer", progress)) == ({0} if threshold > factor else {1})


def test_texture_late() -> None:
    rule = KLora({"layer": 1.0}, "s")
    assert [set(rule.acting("layer", p)) for p in (0.0, 0.3, 0.4, 1.0)] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("scale", ["s", "s*"])
def test_each_call_has_one_adapter_a_layer(kind: str, scale: str) -> None:
    """Against layers switched by hand, at timesteps that are steps of 4, 10 or any number of steps."""
    denoiser: Any = tiny(kind)
    weights = {"content": 0.9, "style": 0.7}
    for seed, name in enumerate(weights):
        add_adapter(denoiser, spec_for(kind), name)
        shake(denoiser, name, seed=seed)
    parts = [adapter_of(denoiser, name) for name in weights]
    rule = k_lora(parts, scale=scale)  # type: ignore[arg-type]
    full = 1.0 if kind == "flux" else 1000.0
    seen = set()
    expected: dict[float, Tensor] = {}
    for timestep in (1000.0, 900.0, 750.0, 600.0, 500.0, 250.0, 100.0, 1.0):
        f = rule.factor(1 - timestep / 1000)
        set_adapters(denoiser, weights)
        for name, layer in denoiser.named_modules():
            if name in rule.thresholds:
                layer.set_adapter(["content"] if rule.thresholds[name] > f else ["style"])
        seen.add(tuple(threshold > f for threshold in rule.thresholds.values()))
        expected[timestep] = output(denoiser, _at(kind, timestep * full / 1000))
    assert len(seen) > 2
    with adapters_by_rule(denoiser, weights, rule, lambda timesteps: timesteps * full / 1000):
        for timestep in (1.0, *expected):
            found = output(denoiser, _at(kind, timestep * full / 1000))
            assert torch.equal(found, expected[timestep]), timestep
    assert not denoiser._forward_pre_hooks
    set_adapters(denoiser, weights)
    both = output(denoiser, _at(kind, full / 2))
    with adapters_by_rule(denoiser, weights, rule):
        output(denoiser, _at(kind, full))
    assert torch.equal(output(denoiser, _at(kind, full / 2)), both)


def _at(kind: str, timestep: float) -> dict[str, Tensor]:
    given = inputs(kind)
    given["timestep"] = torch.full_like(given["timestep"], timestep)
    return given


def test_a_choice_by_layer_and_nothing_at_all() -> None:
    denoiser: Any = tiny("flux")
    for seed, name in enumerate(("content", "style")):
        add_adapter(denoiser, AdapterSpec(rank=4, target_modules=["attn.to_q", "ff.net.2"][seed:]), name)
        shake(denoiser, name, seed=seed)
    with adapters_disabled(denoiser):
        base = output(denoiser, _at("flux", 0.5))
    weights = {"content": 1.0, "style": 0.0}
    asked: list[str] = []

    def choose(timestep: Tensor) -> Any:
        def names(layer: str) -> tuple[str, ...]:
            asked.append(layer)
            return ("style",) if float(timestep) < 0.6 else ("content", "style")

        return names

    set_adapters(denoiser, {"content": 1.0})
    alone = output(denoiser, _at("flux", 0.8))
    with adapters_by_choice(denoiser, weights, choose):
        assert torch.equal(output(denoiser, _at("flux", 0.5)), base)  # what was chosen has no weight
        assert torch.equal(output(denoiser, _at("flux", 0.8)), alone)
    assert {name.rpartition(".attn.")[0] or name.rpartition(".ff.")[0] for name in asked} >= {"transformer_blocks.0"}
    with (
        pytest.raises(QrloraError, match="there is no adapter 'other'"),
        adapters_by_choice(denoiser, {"other": 1.0}, choose),
    ):
        pass


def test_refusals() -> None:
    parts = [made(0), made(1)]
    assert run_time_names() == ("k-lora",)
    assert "k-lora" not in merge_names()
    for options in ({}, {"scale": "s"}):
        with pytest.raises(
            QrloraError, match="k-lora chooses one adapter for each layer and step while it draws, which no"
        ):
            merge(parts, method="k-lora", **options)  # type: ignore[arg-type]
    for some, options, words in (
        (parts[:1], {}, "between a content and a style, in this order; 1 were given"),
        (parts, {"alpha": 0.0}, "alpha=0.0 and beta=0.5 must be finite numbers, alpha above 0"),
        (parts, {"beta": math.inf}, "must be finite numbers"),
        (parts, {"scale": "t"}, "scale='t' is not valid"),
        (parts, {"gamma": 1.0}, "has no option 'gamma'; its options are scale, alpha, beta, score"),
        ([made(0), made(1, base_model="a"), made(2)], {}, "3 were given"),
        ([made(0, base_model="a"), made(1, base_model="b")], {}, "only adapters of one base"),
    ):
        with pytest.raises(QrloraError, match=words):
            run_time_rule("k-lora", some, **options)  # type: ignore[arg-type]
    with pytest.raises(QrloraError, match="'ties' is no method that acts while a picture is drawn, as k-lora is"):
        run_time_rule("ties", parts)
