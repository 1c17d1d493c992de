"""Expert usage: entropy, content against style."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qrlora.adapter import GateUsage
from qrlora.analysis import ExpertUsage, compare_usage, report_usage, usage_entropy
from qrlora.analysis._usage import random_usage_cosine
from qrlora.errors import QrloraError

ONE = ExpertUsage(name="content", layers=["a", "b", "c"], weights=[[1, 0], [0.5, 0.5], [0.25, 0.75]])
TWO = ExpertUsage(name="style", layers=["c", "b", "d"], weights=[[0.75, 0.25], [0.5, 0.5], [0, 1]])


def test_entropy_is_0_for_one_expert_and_1_for_all_alike() -> None:
    assert usage_entropy(torch.tensor([[1.0, 0, 0], [1 / 3] * 3])).tolist() == pytest.approx([0, 1])
    mixed = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))  # bits of two experts are a share of one bit
    assert usage_entropy(ONE.matrix()).tolist() == pytest.approx([0, 1, mixed])


def test_comparison_is_over_common_layers_in_the_order_of_the_first() -> None:
    found = compare_usage([ONE, TWO], 0, 1)
    assert found.layers == ["b", "c"]
    one, two = np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([[0.5, 0.5], [0.75, 0.25]])
    assert np.allclose(found.difference, one - two)
    assert found.mean_difference == pytest.approx([-0.25, 0.25])
    assert found.cosine == pytest.approx(np.vdot(one, two) / (np.linalg.norm(one) * np.linalg.norm(two)))
    assert found.layer_cosines == pytest.approx([1, 0.375 / 0.625])


def test_random_cosine_of_two_experts_is_the_integral() -> None:
    """Shares (x, 1 - x) and (y, 1 - y) of uniform x and y."""
    x = (np.arange(1000) + 0.5) / 1000
    points = np.stack([x, 1 - x], axis=1)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    assert random_usage_cosine(2)[0] == pytest.approx(float((points @ points.T).mean()), abs=0.01)


def test_report() -> None:
    report = report_usage([ONE, TWO, ONE.model_copy(update={"name": "again"})])
    assert [(pair.first, pair.second) for pair in report.comparisons] == [(0, 1), (0, 2), (1, 2)]
    assert report.expert_means[0] == pytest.approx([1.75 / 3, 1.25 / 3])
    assert report.comparisons[1].cosine == pytest.approx(1)


def test_what_does_not_compare() -> None:
    wide = ExpertUsage(name="wide", layers=["a"], weights=[[0.2, 0.3, 0.5]])
    with pytest.raises(QrloraError, match="content and wide do not compare"):
        compare_usage([ONE, wide], 0, 1)


def test_what_record_usage_saves_is_read(tmp_path: Path) -> None:
    recorded = GateUsage("content", ["a"])
    recorded.add("a", torch.tensor([[0.2, 0.8], [0.4, 0.6]]))
    assert ExpertUsage.read(recorded.save(tmp_path / "u.json")).weights[0] == pytest.approx([0.3, 0.7])


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    path.write_text(ONE.model_dump_json())
    assert ExpertUsage.read(path) == ONE
    with pytest.raises(QrloraError, match="nowhere"):
        ExpertUsage.read(tmp_path / "nowhere.json")
    rows = {"rows": [[1.0]], "sums": [[0.7, 0.7]], "negative": [[1.5, -0.5]], "nan": [[math.nan, 1.0]]}
    for name, weights in {**rows, "count": [[1.0, 0.0], [1.0, 0.0]]}.items():
        path.write_text(json.dumps({"name": name, "layers": ["a"], "weights": weights}))
        with pytest.raises(QrloraError, match="no expert usage"):
            ExpertUsage.read(path)
    path.write_text("[[")
    with pytest.raises(QrloraError, match="no expert usage"):
        ExpertUsage.read(path)
