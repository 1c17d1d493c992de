"""Merges against dense float64 sums, and what must not be merged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.errors import QrloraError, QrloraWarning
from qrlora.formats import Adapter, LowRank, read_adapter
from qrlora.merging import merge, merge_names
from tests.adapters_of_data import CONV, LINEAR, dense, made, relative

weights_of_three = st.lists(st.floats(-2, 2, allow_subnormal=False), min_size=3, max_size=3).filter(
    lambda w: max(map(abs, w)) > 0.1
)


def expected(adapters: list[Adapter], weights: list[float], layer: str) -> torch.Tensor:
    return sum(
        (weight * dense(adapter, layer) for adapter, weight in zip(adapters, weights, strict=True)), torch.zeros(())
    )


@pytest.mark.filterwarnings("ignore:.*times as strong as")
@settings(max_examples=20, deadline=None)
@given(weights=weights_of_three, side=st.sampled_from(["output", "input"]))
def test_sum_is_exact_at_the_rank_of_one(weights: list[float], side: str) -> None:
    adapters = [made(seed, side=side) for seed in range(3)]
    merged = merge(adapters, weights)
    assert merged.header is not None
    assert merged.header.method == "sum"
    for layer in (LINEAR, CONV):
        assert merged.layers[layer].rank == 3
        assert relative(dense(merged, layer), expected(adapters, weights, layer)) < 1e-6
    kept = merged.layers[LINEAR].B if side == "output" else merged.layers[LINEAR].A
    assert torch.equal(kept, adapters[0].layers[LINEAR].B if side == "output" else adapters[0].layers[LINEAR].A)


@pytest.mark.filterwarnings("ignore:.*times as strong as")
@settings(max_examples=20, deadline=None)
@given(weights=weights_of_three)
def test_concat_is_exact_at_the_summed_rank_for_any_mixture(weights: list[float]) -> None:
    adapters = [made(0), made(1, side="input", rank=2), made(2, header=False, side=None)]
    merged = merge(adapters, weights, "concat")
    assert merged.header is not None
    assert (merged.header.method, merged.header.basis, merged.header.side, merged.header.rank) == (
        "concat",
        None,
        None,
        8,
    )
    for layer in (LINEAR, CONV):
        assert merged.layers[layer].rank == 8
        assert relative(dense(merged, layer), expected(adapters, weights, layer)) < 1e-6


def test_auto_sums_what_agrees_to_1e_5_and_says_so_when_it_cannot() -> None:
    one = made(0)
    shift = torch.randn(12, 3, generator=torch.Generator().manual_seed(5))
    for size, method in ((3e-6, "sum"), (1e-4, "concat")):
        basis = one.layers[LINEAR].B
        moved = LowRank(basis + size * shift / shift.norm() * basis.norm(), made(1).layers[LINEAR].A)
        other = Adapter({LINEAR: moved, CONV: made(1).layers[CONV]}, made(1).header)
        if method == "sum":
            merged = merge([one, other])
        else:
            with pytest.warns(QrloraWarning, match=rf"{LINEAR} differ .* rank 3 \+ 3 = 6"):
                merged = merge([one, other])
        assert merged.header is not None
        assert merged.header.method == method


def test_auto_concatenates_other_sides_ranks_and_plain_loras() -> None:
    for other, reason in (
        (made(1, side="input"), "different sides"),
        (made(1, rank=2), "ranks"),
        (made(1, header=False), "no basis of its own"),
        (made(1, side=None), "no basis of its own"),
    ):
        with pytest.warns(QrloraWarning, match=reason):
            merged = merge([made(0), other], [0.9, 1.0])
        assert relative(dense(merged, CONV), 0.9 * dense(made(0), CONV) + dense(other, CONV)) < 1e-6
        with pytest.raises(QrloraError, match=reason):
            merge([made(0), other], method="sum")


def test_explicit_sum_of_different_bases_names_the_layer() -> None:
    with pytest.raises(QrloraError, match=f"bases of {LINEAR} differ .* use concat"):
        merge([made(0), made(1, basis_seed=9)], method="sum")


def test_the_header_tells_the_story(tmp_path) -> None:
    one = made(
        0, mask="upper", trigger_words=["<c>"], base_model="base", weight_hashes={LINEAR: "float32:a"}, fingerprint="f"
    )
    two = made(1, mask="full", trigger_words=["<s>", "<c>"], weight_hashes={LINEAR: "float32:a"}, training={"steps": 5})
    merged = read_adapter(merge([one, two], [0.9, 1.0]).save(tmp_path / "both.safetensors"))
    header = merged.header
    assert header is not None
    assert (header.basis, header.side, header.mask, header.rank, header.fingerprint) == ("qr", "output", "full", 3, "f")
    assert header.trigger_words == ["<c>", "<s>"]
    assert header.base_model == "base"
    assert header.weight_hashes == {LINEAR: "float32:a"}
    assert header.merged_from is not None
    assert [part["weight"] for part in header.merged_from] == [0.9, 1.0]
    assert header.merged_from[1]["training"] == {"steps": 5}
    # A merge can be merged again.
    again = merge([merged, one], [1.0, -0.9])
    assert relative(dense(again, LINEAR), dense(two, LINEAR)) < 1e-6


def test_one_adapter_and_no_weights() -> None:
    assert torch.equal(merge([made(0)]).layers[LINEAR].delta(), made(0).layers[LINEAR].delta())
    plain = made(0, header=False)
    assert torch.equal(merge([plain]).layers[LINEAR].delta(), plain.layers[LINEAR].delta())


class TestRefused:
    def test_weights(self) -> None:
        with pytest.raises(QrloraError, match="2 adapters but 1 weights"):
            merge([made(0), made(1)], [1.0])
        with pytest.raises(QrloraError, match="nan is not a finite number"):
            merge([made(0), made(1)], [1.0, float("nan")])
        with pytest.raises(QrloraError, match="nothing to merge"):
            merge([])

    def test_layers(self) -> None:
        less = Adapter({LINEAR: made(1).layers[LINEAR]}, made(1).header)
        for pair in ([made(0), less], [less, made(0)]):
            with pytest.raises(QrloraError, match=CONV):
                merge(pair)

    def test_shapes_and_components(self) -> None:
        wide = Adapter({**made(1).layers, LINEAR: LowRank(torch.randn(12, 3), torch.randn(3, 11))}, made(1).header)
        with pytest.raises(QrloraError, match=rf"{LINEAR} adapts a weight of shape \[12, 11\]"):
            merge([made(0), wide])
        with pytest.raises(QrloraError, match="adapts the unet"):
            merge([made(0), Adapter(made(1).layers, None, "unet")])

    def test_another_base(self) -> None:
        one = made(0, weight_hashes={LINEAR: "float32:a", CONV: "float32:b"})
        with pytest.raises(QrloraError, match=f"another base model .* {CONV} differs"):
            merge([one, made(1, weight_hashes={LINEAR: "float32:a", CONV: "float32:c"})])
        # In another precision the hashes cannot be compared; the stored bases decide.
        assert merge([one, made(1, weight_hashes={LINEAR: "bfloat16:z"})]).layers[LINEAR].rank == 3
        packed = {LINEAR: "packed-Params4bit-float32:a"}
        other = {LINEAR: "packed-Params4bit-float32:b"}
        assert merge([made(0, weight_hashes=packed), made(1, weight_hashes=other)]).layers[LINEAR].rank == 3
        with pytest.raises(QrloraError, match="trained on other"):
            merge([made(0, base_model="base"), made(1, base_model="other")])

    def test_another_base_where_hashes_tell_nothing_or_the_first_has_no_header(self) -> None:
        one = made(0, base_model="base", weight_hashes={LINEAR: "float32:a"})
        two = made(1, base_model="other", weight_hashes={LINEAR: "bfloat16:z"})
        with pytest.raises(QrloraError, match="trained on other"):
            merge([one, two])
        with pytest.raises(QrloraError, match="adapter 3 was trained on other, but adapter 2 on base"):
            merge([made(2, header=False), one, two])

    def test_not_finite(self) -> None:
        bad = made(1)
        bad.layers[CONV].A[0] = float("inf")
        with pytest.raises(QrloraError, match=f"adapter 2: {CONV} has values that are not finite"):
            merge([made(0), bad])

    def test_methods_and_options(self) -> None:
        assert merge_names()[0] == "auto"
        assert {"concat", "sum", "svd"} <= set(merge_names())
        with pytest.raises(QrloraError, match="the known ones are auto, concat, "):
            merge([made(0)], method="mean")
        with pytest.raises(QrloraError, match="no option 'density'; it has no options"):
            merge([made(0)], method="sum", density=0.5)
