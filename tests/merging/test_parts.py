"""Merges of parts of adapters: every layer over those that have it."""

from dataclasses import replace

import pytest
import torch

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter
from qrlora.merging import merge, restricted
from tests.adapters_of_data import CONV, LINEAR, dense, made, relative

pytestmark = pytest.mark.filterwarnings("ignore:.*times as strong as")


def on(adapter: Adapter, *layers: str) -> Adapter:
    return replace(adapter, layers={layer: adapter.layers[layer] for layer in layers})


def test_one_part_of_each_is_what_b_lora_does() -> None:
    content, style = made(0), made(1)
    merged = merge([content, style], [0.9, 1.1], blocks=["blocks.0", "blocks.10-10"])
    assert set(merged.layers) == {LINEAR, CONV}
    assert relative(dense(merged, LINEAR), 0.9 * dense(content, LINEAR)) < 1e-6
    assert relative(dense(merged, CONV), 1.1 * dense(style, CONV)) < 1e-6
    assert merged.header is not None
    assert [part["blocks"] for part in merged.header.merged_from or []] == ["blocks.0", "blocks.10-10"]
    assert (merged.header.rank, merged.header.side) == (3, None)


def test_where_parts_meet_they_are_summed() -> None:
    content, style = made(0), made(1)
    merged = merge([content, style], [0.5, 2.0], blocks=["all", ["blocks.10"]])
    assert relative(dense(merged, LINEAR), 0.5 * dense(content, LINEAR)) < 1e-6
    assert relative(dense(merged, CONV), 0.5 * dense(content, CONV) + 2.0 * dense(style, CONV)) < 1e-6
    assert merged.layers[CONV].rank == 3
    assert merged.header is not None
    assert merged.header.method == "sum"


def test_different_bases_are_concatenated_where_they_meet() -> None:
    content, style = made(0), made(1, basis_seed=30)
    with pytest.warns(QrloraWarning, match="so the adapters are concatenated"):
        merged = merge([content, style], blocks=["all", "blocks.10"])
    assert (merged.layers[LINEAR].rank, merged.layers[CONV].rank) == (3, 6)
    assert relative(dense(merged, CONV), dense(content, CONV) + dense(style, CONV)) < 1e-6


def test_all_of_both_is_the_plain_merge() -> None:
    parts = [made(0), made(1)]
    whole, plain = merge(parts, blocks=["all", "all"]), merge(parts)
    assert whole.header is not None
    assert plain.header is not None
    assert whole.header.fingerprint == plain.header.fingerprint
    assert all(torch.equal(whole.layers[layer].A, plain.layers[layer].A) for layer in (LINEAR, CONV))


def test_adapters_of_different_layers_merge_only_when_asked() -> None:
    content, style = on(made(0), LINEAR), on(made(1), CONV)
    with pytest.raises(
        QrloraError, match=r"does not adapt blocks.0.attn.to_q, .* only equal layers merge, unless blocks"
    ):
        merge([content, style])
    merged = merge([content, style], blocks=["all", "all"])
    assert relative(dense(merged, LINEAR), dense(content, LINEAR)) < 1e-6
    assert relative(dense(merged, CONV), dense(style, CONV)) < 1e-6


def test_a_part_keeps_the_tensors_of_its_own_layers_alone() -> None:
    own = {layer: {"some": torch.ones(1)} for layer in (LINEAR, CONV)}
    assert set(restricted(replace(made(0), own=own), "blocks.0").own) == {LINEAR}


def test_refusals() -> None:
    with pytest.raises(QrloraError, match="2 adapters but 1 blocks"):
        merge([made(0), made(1)], blocks=["all"])
    with pytest.raises(QrloraError, match=r"blocks='blocks\.3' holds none of the 2 layers"):
        merge([made(0), made(1)], blocks=["blocks.3", "all"])
    narrow = replace(made(1), layers={LINEAR: made(1, rank=2).layers[LINEAR]})
    other = replace(made(0), layers={LINEAR: type(made(0).layers[LINEAR])(torch.ones(5, 3), torch.ones(3, 10))})
    with pytest.raises(QrloraError, match="different base models"):
        merge([narrow, other], blocks=["all", "all"])
