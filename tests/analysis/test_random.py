"""The Monte Carlo baselines against what theory expects."""

import math

import pytest

from qrlora.analysis._measure import Kind
from qrlora.analysis._random import Baselines, Shapes

PLAIN, QR, MASKED = Kind(3, None, False), Kind(3, "output", False), Kind(3, "output", True)


def test_independent_updates() -> None:
    found = Baselines(draws=200).of(Shapes(12, 20, (PLAIN, PLAIN), (3, 3), shared=False))
    # E <dW1, dW2>^2 / (|dW1| |dW2|)^2 = 1 / (out * in): a Gaussian product has no preferred direction on either side.
    assert found["update.cosine"].mean == 0
    assert found["update.cosine"].std == pytest.approx(1 / math.sqrt(12 * 20), rel=0.2)
    assert found["lora_B.cosine"].std == pytest.approx(1 / math.sqrt(12 * 3), rel=0.2)
    # E ||U1^T U2||_F^2 = p q / d for uniform subspaces.
    assert found["output.overlap"].mean == pytest.approx(3 / 12, rel=0.08)
    assert found["input.overlap"].mean == pytest.approx(3 / 20, rel=0.08)
    assert found["lora_A.cka"].mean == pytest.approx(3 / 23, rel=0.1)
    assert "Q.cosine" not in found


def test_a_shared_basis_leaves_the_coefficients_alone_to_differ() -> None:
    found = Baselines(draws=200).of(Shapes(12, 20, (QR, QR), (3, 3), shared=True))
    assert found["update.cosine"].std == pytest.approx(1 / math.sqrt(3 * 20), rel=0.2)
    assert found["Q.cosine"].std == pytest.approx(1 / math.sqrt(12 * 3), rel=0.2)
    assert found["R.cosine"].std == pytest.approx(1 / math.sqrt(20 * 3), rel=0.2)
    assert found["output.overlap"].mean == pytest.approx(3 / 12, rel=0.08)


def test_masked_coefficients_have_fewer_free_entries() -> None:
    baselines = Baselines(draws=200)
    free = 3 * 20 - 3  # three entries below the diagonal of [3, 20]
    masked = baselines.of(Shapes(12, 20, (MASKED, MASKED), (3, 3), shared=False))
    assert masked["dR.cosine"].std == pytest.approx(1 / math.sqrt(free), rel=0.2)
    gated = baselines.of(Shapes(12, 20, (QR, QR), (3, 3), shared=False, experts=2))
    assert gated["gate.cosine"].std == pytest.approx(1 / math.sqrt(20 * 2), rel=0.2)


def test_spaces_of_other_dimensions() -> None:
    found = Baselines(draws=100).of(Shapes(12, 20, (Kind(4, None, False), PLAIN), (2, 3), shared=False))
    assert found["output.overlap"].mean == pytest.approx(3 / 12, rel=0.2)
    assert "lora_B.cosine" not in found
    assert "output.smallest" not in Baselines(draws=2).of(Shapes(12, 20, (PLAIN, PLAIN), (0, 3), shared=False))


def test_same_seed_same_numbers_whatever_was_asked_before() -> None:
    shapes = Shapes(6, 8, (QR, QR), (3, 3), shared=False)
    one, two, other = Baselines(draws=3), Baselines(draws=3), Baselines(seed=1, draws=3)
    two.of(Shapes(7, 7, (QR, QR), (3, 3), shared=False))
    assert one.of(shapes) == two.of(shapes) != other.of(shapes)
    assert one.of(shapes) is one.of(shapes)
