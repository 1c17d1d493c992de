"""Norms of the inputs of a merge: reported, warned of, and made equal; against dense float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, LowRank
from qrlora.merging import NORM_RATIO_LIMIT, merge, norm_ratio, update_norm
from tests.adapters_of_data import CONV, LINEAR, dense, made, relative


def dense_norm(adapter: Adapter) -> float:
    return math.sqrt(sum(float(dense(adapter, layer).square().sum()) for layer in adapter.layers))


def untrained(adapter: Adapter) -> Adapter:
    layers = {name: LowRank(pair.B, torch.zeros_like(pair.A)) for name, pair in adapter.layers.items()}
    return Adapter(layers, adapter.header)


def test_update_norm_is_that_of_the_dense_updates() -> None:
    for adapter in (made(0), made(1, side="input"), made(2, header=False, side=None)):
        assert update_norm(adapter) == pytest.approx(dense_norm(adapter), rel=1e-9)
        assert update_norm(adapter, [CONV]) == pytest.approx(float(dense(adapter, CONV).norm()), rel=1e-9)
    assert update_norm(untrained(made(0))) == 0


def test_update_norm_where_two_halves_nearly_cancel() -> None:
    """As in the rank-2r form of factors trained together, B A - Q R: the difference is a thousandth of its parts."""
    pair = made(0).layers[LINEAR]
    moved = pair.A + 1e-3 * made(1).layers[LINEAR].A
    both = LowRank(torch.cat([pair.B, -pair.B], dim=1), torch.cat([moved, pair.A]))
    adapter = Adapter({LINEAR: both})
    assert update_norm(adapter) == pytest.approx(dense_norm(adapter), rel=1e-6)


def test_update_norm_where_one_tensor_is_both_factors() -> None:
    X = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    adapter = Adapter({"a": LowRank(X, X)}, None)
    assert update_norm(adapter) == pytest.approx(float((X.double() @ X.double()).norm()), rel=1e-12)


def test_norm_ratio() -> None:
    assert norm_ratio([2.0, -8.0, 4.0]) == 4
    assert norm_ratio([2.0, 0.0]) is None


def test_the_header_holds_every_norm() -> None:
    adapters = [made(0), made(1)]
    header = merge(adapters, [0.9, -1.1]).header
    assert header is not None
    assert header.merged_from is not None
    assert [part["norm"] for part in header.merged_from] == pytest.approx([dense_norm(one) for one in adapters])
    assert [part["weight"] for part in header.merged_from] == [0.9, -1.1]
    assert "scale" not in header.merged_from[0]


def test_unequal_norms_are_warned_of_by_name_above_the_limit() -> None:
    assert NORM_RATIO_LIMIT == 3
    one = made(0)
    merge([one, one.scaled(2.9)])
    merge([one, one.scaled(50)], [1, 0.05])
    merge([one, one.scaled(50)], [1, 0])
    with pytest.warns(QrloraWarning, match="adapter 2 is 3.1 times as strong as adapter 1 .* merge with normalize"):
        merge([one, one.scaled(3.1)])
    with pytest.warns(QrloraWarning, match="adapter 1 is 4 times as strong as adapter 3"):
        merge([one, one, one], [1, 0, -0.25])
    with pytest.warns(QrloraWarning, match="update of adapter 2 is zero"):
        merge([one, untrained(made(1))])


@settings(max_examples=10, deadline=None)
@given(scales=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=3), method=st.sampled_from(["sum", "concat"]))
def test_normalize_brings_all_to_the_geometric_mean(scales: list[float], method: str) -> None:
    adapters = [made(seed).scaled(scale) for seed, scale in enumerate(scales)]
    weights = [0.9, -0.3, 1.0][: len(adapters)]
    norms = [dense_norm(adapter) for adapter in adapters]
    mean = math.prod(norms) ** (1 / len(norms))
    merged = merge(adapters, weights, method, normalize=True)
    for layer in (LINEAR, CONV):
        parts = [
            weight * mean / norm * dense(one, layer) for one, weight, norm in zip(adapters, weights, norms, strict=True)
        ]
        assert relative(dense(merged, layer), sum(parts, torch.zeros(()))) < 1e-5
    assert merged.header is not None
    assert merged.header.merged_from is not None
    assert [part["scale"] for part in merged.header.merged_from] == pytest.approx([mean / norm for norm in norms])
    assert [part["weight"] for part in merged.header.merged_from] == weights


def test_normalize_does_not_depend_on_the_order() -> None:
    one, two = made(0), made(1).scaled(40)
    forward, backward = merge([one, two], normalize=True), merge([two, one], normalize=True)
    assert relative(dense(forward, CONV), dense(backward, CONV)) < 1e-6


def test_normalize_refuses_a_zero_update() -> None:
    with pytest.raises(QrloraError, match="update of adapter 2 is zero, so no factor"):
        merge([made(0), untrained(made(1))], normalize=True)
