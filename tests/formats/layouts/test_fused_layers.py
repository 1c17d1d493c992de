"""Fused layers: exact in both directions, whatever the ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.formats import LowRank
from qrlora.formats.keys import Target, table_of
from qrlora.formats.layouts._fused import fuse, split
from tests.real_layers import dense64


def target(name: str) -> Target:
    found = table_of("flux").by_name(name) or table_of("sd3").by_name(name)
    assert found is not None
    return found


QKV, LINEAR1 = target("double_blocks.0.img_attn.qkv"), target("single_blocks.0.linear1")


def stacked(fused: Target, pairs: dict[str, LowRank], unit: int, inputs: int) -> Tensor:
    """What the fused layer's dense update has to be."""
    zeros = {part.path: torch.zeros(part.share * unit, inputs, dtype=torch.float64) for part in fused.parts}
    return torch.cat(list((zeros | {path: dense64(pair) for path, pair in pairs.items()}).values()))


@settings(max_examples=40, deadline=None)
@given(
    fused=st.sampled_from([QKV, LINEAR1]),
    ranks=st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(lambda ranks: any(ranks[:3])),
    shared=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_there_and_back(fused: Target, ranks: list[int], shared: bool, seed: int) -> None:
    unit, inputs = 5, 6
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(max(ranks), inputs, generator=generator)
    pairs = {
        part.path: LowRank(
            torch.randn(part.share * unit, len(A) if shared else rank, generator=generator),
            A if shared else torch.randn(rank, inputs, generator=generator),
        )
        for part, rank in zip(fused.parts, ranks, strict=False)
        if rank
    }
    whole = fuse(fused, pairs)
    different = {pair.rank for pair in pairs.values()}
    if shared or len(pairs) == 1:
        assert whole.rank == next(iter(different))
    elif len(different) == 1:
        assert whole.rank == len(fused.parts) * different.pop()
    else:
        assert whole.rank == sum(pair.rank for pair in pairs.values())
    torch.testing.assert_close(dense64(whole), stacked(fused, pairs, unit, inputs), rtol=1e-12, atol=1e-12)
    back = split(fused, whole)
    assert set(back) == set(pairs)
    for path, pair in pairs.items():
        assert back[path].rank <= pair.rank
        torch.testing.assert_close(dense64(back[path]), dense64(pair), rtol=1e-12, atol=1e-12)


def test_a_fused_lora_that_was_trained_as_one_is_taken_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = LowRank(torch.randn(35, 4, generator=generator), torch.randn(4, 6, generator=generator))
    back = split(LINEAR1, whole)
    assert [pair.rank for pair in back.values()] == [4, 4, 4, 4]
    assert [pair.shape[0] for pair in back.values()] == [5, 5, 5, 20]
    torch.testing.assert_close(torch.cat([dense64(pair) for pair in back.values()]), dense64(whole), rtol=0, atol=0)


def test_an_untrained_layer_keeps_all_its_parts() -> None:
    assert len(split(QKV, LowRank(torch.zeros(15, 4), torch.randn(4, 6)))) == 3
    assert len(split(QKV, LowRank(torch.zeros(15, 3), torch.zeros(3, 6)))) == 3


def test_halves_change_places_where_diffusers_has_them_the_other_way_round() -> None:
    B, A = torch.arange(8.0)[:, None], torch.ones(1, 4)
    turned = torch.tensor([4.0, 5, 6, 7, 0, 1, 2, 3])
    for name in ("final_layer.adaLN_modulation.1", "joint_blocks.3.context_block.adaLN_modulation.1"):
        (pair,) = split(target(name), LowRank(B, A)).values()
        assert torch.equal(pair.B[:, 0], turned)
    for name in ("joint_blocks.3.x_block.adaLN_modulation.1", "double_blocks.0.img_mod.lin"):
        (pair,) = split(target(name), LowRank(B, A)).values()
        assert torch.equal(pair.B[:, 0], B[:, 0])
    (six,) = split(target("joint_blocks.3.context_block.adaLN_modulation.1"), LowRank(torch.ones(24, 1), A)).values()
    assert torch.equal(six.B, torch.ones(24, 1))


def test_what_does_not_fit_is_refused_by_name() -> None:
    def pair(rows: int, inputs: int = 4) -> LowRank:
        return LowRank(torch.randn(rows, 2), torch.randn(2, inputs))

    q, k, *_ = (part.path for part in QKV.parts)
    with pytest.raises(QrloraError, match=r"to_q has 8 outputs, .*to_k has 6 outputs, which is not how"):
        fuse(QKV, {q: pair(8), k: pair(6)})
    with pytest.raises(QrloraError, match="inputs of different sizes"):
        fuse(QKV, {q: pair(8), k: pair(8, 5)})
    with pytest.raises(QrloraError, match="10 outputs, which cannot be shared out among"):
        split(QKV, pair(10))
    with pytest.raises(QrloraError, match="odd number"):
        split(target("final_layer.adaLN_modulation.1"), pair(7))
