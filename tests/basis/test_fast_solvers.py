"""The fast solvers' own parts: orthonormal blocks, when a Krylov space stops, refined eigenvectors, several threads."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qrlora.basis import ANGLE_TOLERANCE, leading_subspace, make_basis
from qrlora.basis import _krylov as krylov
from qrlora.basis._certificate import ritz
from qrlora.basis._linalg import quick_orthonormal
from qrlora.basis._precision import full_precision
from qrlora.basis._solvers import gram_block
from tests.basis.weights import degrees, off_orthonormal, power_law, reference, tensor


@settings(max_examples=20, deadline=None, derandomize=True)
@given(condition=st.integers(0, 12), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_quick_orthonormal_spans_the_block_however_badly_conditioned(
    condition: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(60, 8, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    block = ((left * torch.logspace(0, -condition, 8, dtype=torch.float64)) @ right).to(dtype)
    found = quick_orthonormal(block)
    eps = torch.finfo(dtype).eps
    assert off_orthonormal(found) <= 100 * eps
    missed = block.double() - found.double() @ (found.double().T @ block.double())
    assert float(missed.norm()) <= 100 * eps * float(block.double().norm())


@pytest.mark.parametrize("block", [torch.zeros(9, 3), torch.ones(9, 3)])
def test_quick_orthonormal_completes_what_has_no_full_rank(block: Tensor) -> None:
    assert off_orthonormal(quick_orthonormal(block)) < 1e-5


def blocks_used(monkeypatch: pytest.MonkeyPatch, weight: Tensor, rank: int) -> tuple[int, float]:
    """Columns of the Krylov space, and the angle of what it gave to the truth, in degrees."""
    spaces: list[krylov._Space] = []

    class Watched(krylov._Space):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # pyright: ignore[reportArgumentType]
            spaces.append(self)

    monkeypatch.setattr(krylov, "_Space", Watched)
    found = leading_subspace(weight, rank, solver="krylov")
    return spaces[0].filled, degrees(found.vectors, reference(weight)[0][:, :rank])


def test_a_krylov_space_grows_no_further_than_the_angle_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    steep, angle = blocks_used(monkeypatch, tensor(power_law(400, 400, exponent=-1.0)), 8)
    assert angle <= ANGLE_TOLERANCE
    slow, angle = blocks_used(monkeypatch, tensor(power_law(400, 400, exponent=-0.3)), 8)
    assert angle <= ANGLE_TOLERANCE
    assert steep < slow < 12 * 8


def test_a_krylov_space_gives_up_early_where_nothing_can_come_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.randn(500, 500, generator=torch.Generator().manual_seed(3))
    used, angle = blocks_used(monkeypatch, flat, 8)
    assert angle > ANGLE_TOLERANCE
    assert used < 12 * 8


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_gram_in_fp32_is_refined_to_what_fp64_gives(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))  # close singular values
    truth = reference(weight)[0][:, :20]
    plain = torch.linalg.eigh(weight @ weight.T)[1].flip(1)[:, :20]
    refined = ritz(weight, gram_block(weight, 40, leading=True, fp64=False)).vectors[:, :20]
    assert degrees(refined, truth) < 0.02 * degrees(plain, truth)


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_weight_seen_from_either_side(side: str) -> None:
    weight = tensor(power_law(520, 640))
    found = leading_subspace(weight, 10, side=side, solver="krylov")  # pyright: ignore[reportArgumentType]
    assert degrees(found.vectors, reference(weight, side)[0][:, :10]) <= found.angle <= ANGLE_TOLERANCE


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_precision_is_put_back_by_the_last_of_several_threads() -> None:
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision(torch.device("cpu")):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    try:
        with full_precision(torch.device("cpu")):
            thread.start()
            inside.wait(10)
        assert switch.fp32_precision == "ieee"
        leave.set()
        thread.join()
        assert switch.fp32_precision == "tf32"
    finally:
        leave.set()
        switch.fp32_precision = before


def test_infinities_and_nans_are_seen_wherever_they_are() -> None:
    from qrlora.errors import QrloraError

    for bad in (np.nan, np.inf, -np.inf):
        weight = torch.ones(5, 6)
        weight[3, 4] = bad
        with pytest.raises(QrloraError, match="to_q: the weight holds NaN or infinite"):
            make_basis(weight, 2, layer="to_q")
