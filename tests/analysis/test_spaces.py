"""Norms, cosines, spectra and angles of updates against the dense float64 matrices."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qrlora.analysis import Factors, effective_rank, inner_product, principal_angles, update_cosine, update_space
from qrlora.errors import QrloraError
from qrlora.formats import LowRank
from tests.adapters_of_data import CONV, LINEAR, dense, made


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("layer", [LINEAR, CONV])
def test_inner_products_are_those_of_the_dense_updates(layer: str) -> None:
    one, two = made(0), made(1, header=False, rank=2)
    first, second = dense(one, layer), dense(two, layer)
    factors = [Factors.of(adapter.layers[layer]) for adapter in (one, two)]
    assert inner_product(*factors) == pytest.approx(float((first * second).sum()), rel=1e-10)
    expected = float((first * second).sum() / (first.norm() * second.norm()))
    assert update_cosine(*factors) == pytest.approx(expected, rel=1e-10)


def test_the_cosine_of_a_zero_update_is_not_defined() -> None:
    zero = Factors(torch.zeros(4, 2, dtype=torch.float64), torch.ones(5, 2, dtype=torch.float64))
    assert update_cosine(zero, zero) is None
    assert update_space(zero).output.shape == (4, 0)
    assert effective_rank(update_space(zero).spectrum) == 0


@pytest.mark.parametrize("layer", [LINEAR, CONV])
def test_update_space_is_the_svd_of_the_dense_update(layer: str) -> None:
    adapter = made(3)
    space, expected = update_space(Factors.of(adapter.layers[layer])), dense(adapter, layer)
    _, values, _ = np.linalg.svd(expected.numpy(), full_matrices=False)
    assert np.allclose(space.spectrum, values[:3], rtol=1e-10)
    rebuilt = space.output @ torch.diag(space.spectrum) @ space.input.T
    assert torch.allclose(rebuilt, expected, atol=1e-12)


def test_directions_that_cancel_are_no_directions() -> None:
    """A pair of rank 4 whose second half is a copy of the first has an update of rank 2; ranks above the width too."""
    pair = made(0, rank=2).layers[LINEAR]
    doubled = Factors.of(LowRank(torch.cat([pair.B, pair.B], dim=1), torch.cat([pair.A, pair.A])))
    assert update_space(doubled).output.shape == (12, 2)
    wide = Factors(orthonormal(12, 12), orthonormal(10, 10) @ torch.eye(10, 12, dtype=torch.float64))
    assert update_space(wide).input.shape == (10, 10)


def test_effective_rank() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    shares = (0.75, 0.25)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


ANGLES = st.one_of(st.floats(1e-9, 1e-3), st.floats(0.1, 89.9), st.sampled_from([0.0, 45.0, 90.0]))


@settings(max_examples=15, deadline=None)
@given(
    degrees=st.lists(ANGLES, min_size=1, max_size=4),
    extra=st.integers(0, 2),
    seed=st.integers(0, 100),
)
def test_angles_that_were_put_in_come_out(degrees: list[float], extra: int, seed: int) -> None:
    """Planes spanned with known angles, turned at random: also a billionth of a degree keeps its digits."""
    axes = orthonormal(14, 14, seed)
    count = len(degrees)
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    one = axes[:, : count + extra]
    two = axes[:, :count] * radians.cos() + axes[:, count + extra : 2 * count + extra] * radians.sin()
    for first, second in ((one @ orthonormal(count + extra, count + extra, seed + 1), two), (two, one)):
        found = principal_angles(first, second)
        assert found == pytest.approx(sorted(degrees), rel=1e-5, abs=1e-12)


def test_angles_need_one_space() -> None:
    with pytest.raises(QrloraError, match="of one space"):
        principal_angles(orthonormal(5, 2), orthonormal(6, 2))
    assert principal_angles(orthonormal(5, 2), torch.zeros(5, 0, dtype=torch.float64)) == []
