"""Expert usage: entropy, content against style."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qrlora.adapter import GateUsage
from qrlora.analysis import ExpertUsage, analyze, compare_usage, report_usage, usage_entropy
from qrlora.analysis._usage import random_usage_cosine
from qrlora.analysis._usage_pictures import _grid  # pyright: ignore[reportPrivateUsage]
from qrlora.errors import QrloraError
from tests.adapters_of_data import made

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
    apart = ExpertUsage(name="apart", layers=["z"], weights=[[0.5, 0.5]])
    report = report_usage([ONE, wide, TWO, apart])
    assert [(pair.first, pair.second) for pair in report.comparisons] == [(0, 2)]
    notes = analyze([made(0)], usages=[ONE, TWO, wide], draws=2).notes
    assert [note.partition(" are not compared")[0] for note in notes] == [
        f"The expert usages of {one} and wide" for one in ("content", "style")
    ]


def test_pictures_have_layers_in_one_order() -> None:
    """That of the entropies and of all other pictures, whatever the order in the file."""
    paths = [
        "single_transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_v",
        "transformer_blocks.1.attn.to_k",
    ]
    grid = _grid(dict(zip(paths, ONE.weights, strict=True)))
    assert grid.modules == ["expert 1", "expert 2"]
    assert grid.blocks == ["block 1", "block 1", "single 0"]
    assert grid.cells == [[0.25, 0.5, 1], [0.75, 0.5, 0]]


def test_gates_that_are_not_finite_are_no_usage() -> None:
    recorded = GateUsage("gated_0", ["a"])
    with pytest.raises(QrloraError, match="the gates of ink gave no usage: List should have at least 1 item"):
        ExpertUsage.of(recorded, "ink")
    recorded.add("a", torch.tensor([[0.2, math.nan]]))
    with pytest.raises(QrloraError, match=r"the gates of ink gave no usage: .* not shares that sum to 1"):
        ExpertUsage.of(recorded, "ink")


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
