"""Merges of adapters with companions, against dense float64 sums of every component."""

from dataclasses import replace

import pytest
import torch

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, Component
from qrlora.merging import check_compatible, merge, refactor, restricted, update_norm
from tests.adapters_of_data import CONV, LINEAR, dense, made, relative, with_words

pytestmark = pytest.mark.filterwarnings("ignore:.*times as strong as")
WORDS = "text_model.encoder.layers.0.self_attn.q_proj"


def norm(adapter: Adapter) -> float:
    parts = adapter.components.values()
    return sum(float(dense(part, layer).square().sum()) for part in parts for layer in part.layers) ** 0.5


def delta(adapter: Adapter, component: Component) -> torch.Tensor:
    return dense(adapter.components[component], WORDS)


@pytest.mark.parametrize("method", ["sum", "concat", "auto"])
def test_companions_are_merged_at_the_same_weights(method: str) -> None:
    parts = [with_words(seed, "text_encoder", "text_encoder_2") for seed in (0, 1)]
    merged = merge(parts, [0.9, -1.1], method)
    assert list(merged.companions) == ["text_encoder", "text_encoder_2"]
    for component in ("text_encoder", "text_encoder_2"):
        expected = 0.9 * delta(parts[0], component) - 1.1 * delta(parts[1], component)
        assert relative(delta(merged, component), expected) < 1e-6
        header = merged.companions[component].header
        assert header is not None
        assert header.method == ("concat" if method == "concat" else "sum")
        assert [part["weight"] for part in header.merged_from or []] == [0.9, -1.1]
    alone = merge([part.alone() for part in parts], [0.9, -1.1], method)
    for layer in (LINEAR, CONV):
        assert torch.equal(alone.layers[layer].A, merged.layers[layer].A)
    assert not alone.companions


@pytest.mark.parametrize("method", ["sum", "concat", "auto"])
def test_a_missing_companion_is_zero(method: str) -> None:
    parts = [with_words(0), with_words(1, "text_encoder"), with_words(2, "text_encoder_2")]
    merged = merge(parts, [0.5, 2.0, -1.0], method)
    assert relative(delta(merged, "text_encoder"), 2.0 * delta(parts[1], "text_encoder")) < 1e-6
    assert relative(delta(merged, "text_encoder_2"), -delta(parts[2], "text_encoder_2")) < 1e-6
    assert {merged.companions[each].layers[WORDS].rank for each in merged.companions} == {3}


def test_a_missing_layer_of_a_companion_is_zero() -> None:
    one, other = with_words(0, "text_encoder"), with_words(1, "text_encoder")
    companion = one.companions["text_encoder"]
    more = replace(companion, layers={**companion.layers, "text_projection": companion.layers[WORDS]})
    merged = merge([replace(one, companions={"text_encoder": more}), other], [0.5, 2.0])
    assert relative(dense(merged.companions["text_encoder"], "text_projection"), 0.5 * dense(companion, WORDS)) < 1e-6
    expected = 0.5 * delta(one, "text_encoder") + 2.0 * delta(other, "text_encoder")
    assert relative(delta(merged, "text_encoder"), expected) < 1e-6


def test_companions_of_different_bases_are_concatenated() -> None:
    one, other = with_words(0, "text_encoder"), with_words(1, "text_encoder", words_basis=30)
    with pytest.warns(QrloraWarning, match=f"the bases of {WORDS} differ .* so the adapters are concatenated"):
        merged = merge([one, other])
    assert (merged.layers[LINEAR].rank, merged.companions["text_encoder"].layers[WORDS].rank) == (3, 6)
    assert relative(delta(merged, "text_encoder"), delta(one, "text_encoder") + delta(other, "text_encoder")) < 1e-6
    with pytest.warns(QrloraWarning, match=f"the bases of {WORDS} differ .* so the adapters are concatenated"):
        summed = merge([one, other], method="sum")
    assert (summed.layers[LINEAR].rank, summed.companions["text_encoder"].layers[WORDS].rank) == (3, 6)


def test_messages_name_the_adapter_whose_companion_is_meant() -> None:
    parts = [made(0), with_words(1, "text_encoder"), replace(with_words(2, "text_encoder", words_basis=30), source="c")]
    with pytest.warns(QrloraWarning, match=r"between adapter 2 \(text_encoder\) and c \(text_encoder\)"):
        merged = merge(parts)
    assert merged.companions["text_encoder"].source is None


def test_blocks_apply_to_the_denoiser_alone() -> None:
    parts = [with_words(seed, "text_encoder") for seed in (0, 1)]
    assert set(restricted(parts[0], "blocks.0").layers) == {LINEAR}
    assert restricted(parts[0], "blocks.0").companions == parts[0].companions
    merged = merge(parts, [0.5, 2.0], blocks=["blocks.0", "blocks.10"])
    assert relative(dense(merged, LINEAR), 0.5 * dense(parts[0], LINEAR)) < 1e-6
    expected = 0.5 * delta(parts[0], "text_encoder") + 2.0 * delta(parts[1], "text_encoder")
    assert relative(delta(merged, "text_encoder"), expected) < 1e-6


def test_norms_are_of_the_whole_update() -> None:
    parts = [with_words(0, "text_encoder"), with_words(1).scaled(3.0)]
    norms = [norm(part) for part in parts]
    assert [update_norm(part) for part in parts] == pytest.approx(norms, rel=1e-6)
    assert update_norm(parts[0], parts[0].layers) == pytest.approx(norm(parts[0].alone()), rel=1e-6)
    merged = merge(parts, normalize=True)
    scale = (norms[0] * norms[1]) ** 0.5 / norms[0]
    assert relative(delta(merged, "text_encoder"), scale * delta(parts[0], "text_encoder")) < 1e-6


def test_another_rank_for_all_components() -> None:
    merged = merge([with_words(0, "text_encoder"), with_words(1, "text_encoder", words_basis=30)], method="concat")
    brought, error = refactor(merged, 2)
    assert {pair.rank for part in brought.components.values() for pair in part.layers.values()} == {2}
    lost = sum(
        float((dense(brought.components[component], layer) - dense(part, layer)).square().sum())
        for component, part in merged.components.items()
        for layer in part.layers
    )
    assert error == pytest.approx(lost**0.5 / norm(merged), rel=1e-5)


def test_companions_are_checked_like_adapters() -> None:
    one = with_words(0, "text_encoder", weight_hashes={WORDS: "float32:a"})
    other = with_words(1, "text_encoder", weight_hashes={WORDS: "float32:b"})
    with pytest.raises(QrloraError, match=f"another base model than .*: the weight of {WORDS} differs"):
        check_compatible([one, other])
    bad = with_words(1, "text_encoder")
    bad.companions["text_encoder"].layers[WORDS].A[0, 0] = float("nan")
    with pytest.raises(QrloraError, match=f"{WORDS} has values that are not finite"):
        merge([made(0), bad])


def test_scaled_scales_companions() -> None:
    adapter = with_words(0, "text_encoder", "text_encoder_2")
    half = adapter.scaled(0.5)
    for component in adapter.companions:
        assert relative(delta(half, component), 0.5 * delta(adapter, component)) < 1e-6
