"""The performance benchmark: its clockwork on a fake clock, its formulas in float64, its table; no times."""

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.performance import __main__ as command
from benchmarks.performance import _layers as layers
from benchmarks.performance import table
from benchmarks.performance._copy import copy_bytes, merge_files
from benchmarks.performance._flux import adapter_of_size, distinct_shapes, layer_shapes
from benchmarks.performance._measure import Times, interleaved, kept_for_backward, process_seconds
from benchmarks.performance._row import Found, Goal, NotHere, Row
from benchmarks.performance.plots import draw_all
from benchmarks.performance.rows import ROWS, disk, growth
from benchmarks.performance.rows import script as script_row
from qrlora.formats import read_adapter

HEAVY = ("script", "demo", "start", "merge", "step")
"""Whole processes and the embedded base; the others have a test each where their size allows it."""


class _Clock:
    """Seconds that pass only where a way says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def __call__(self) -> float:
        return self.now

    def way(self, name: str, seconds: list[float]) -> Any:
        left = iter(seconds)

        def call() -> None:
            self.called.append(name)
            self.now += next(left)

        return call


def test_ways_take_turns_and_the_warm_up_does_not_count() -> None:
    clock = _Clock()
    ways = {"a": clock.way("a", [100, 1, 2, 9]), "b": clock.way("b", [100, 4, 5, 6]), "c": clock.way("c", [1] * 4)}
    times = interleaved(ways, 3, clock=clock)
    assert times.seconds == {"a": [1, 2, 9], "b": [4, 5, 6], "c": [1, 1, 1]}
    assert [clock.called[i : i + 3] for i in range(0, 12, 3)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_a_ratio_is_the_median_of_the_turns_own_ratios() -> None:
    # The second turn was slow for both, which the ratio does not see; the ratio of medians would be 2.5.
    times = Times({"base": [1.0, 10.0, 2.0], "way": [3.0, 30.0, 5.0]})
    assert times.median("way") == 5.0
    assert times.ratio("way", "base") == 3.0
    assert times.ratios("base") == {"base": 1.0, "way": 3.0}


def test_kept_bytes_are_counted_once_and_parameters_not_at_all() -> None:
    layer = nn.Linear(8, 4)
    x = torch.randn(5, 8, requires_grad=True)
    hidden: list[Tensor] = []

    def forward() -> Tensor:
        hidden.append(layer(x))  # keeps x, for the weight's gradient
        return hidden[0].sigmoid() + hidden[0].square()  # the result of the one, and the input of the other

    assert kept_for_backward(layer, forward) == 4 * (5 * 8 + 5 * 4 + 5 * 4)


@hypothesis_settings(max_examples=10, deadline=None)
@given(out=st.integers(4, 12), inputs=st.integers(4, 12), rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_published_layer_is_ours_in_float64(out: int, inputs: int, rank: int, seed: int) -> None:
    setting = layers.Setting((out, inputs), 6, rank, torch.float64)
    ours = layers.way(layers.OURS, setting, mask="full").model.double()
    held: Any = ours.layer
    Q = held.lora_B["adapter"].weight
    published = layers.PublishedLayer(held.base_layer, Q)
    generator = torch.Generator().manual_seed(seed)
    dR = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        held.lora_A["adapter"].weight.copy_(dR)
        published.dR.copy_(dR)
    x, gradient = setting.tensors()
    results: list[Tensor] = []
    for model, trained in ((ours, held.lora_A["adapter"].weight), (published, published.dR)):
        x.grad = None
        y = model(x)
        y.backward(gradient)
        assert x.grad is not None
        results += [y.detach(), x.grad.clone(), trained.grad.clone()]
    dense = held.base_layer.weight + Q @ dR
    torch.testing.assert_close(results[0], (x @ dense.T + held.base_layer.bias).detach(), rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_ours_and_peft_are_equally_near_to_the_dense_formula() -> None:
    found = layers.deviation(layers.Setting((48, 64), 32, 4, torch.float32))
    assert set(found) == {f"{who} {what}" for who in ("qrlora", "peft") for what in ("y", "x", "A")}
    assert max(found.values()) < 1e-5


def test_operations_are_those_of_the_matrix_products() -> None:
    """Multiplications counted product by product."""
    m, n, r, tokens = 96, 64, 8, 10
    frozen = 2 * tokens * m * n
    own = tokens * (n * r + r * m) + tokens * (m * r + r * n) + tokens * r * n
    assert layers.Setting((m, n), tokens, r).operations() == pytest.approx((frozen + own) / frozen)


def test_the_shapes_are_flux_devs() -> None:
    assert distinct_shapes(layer_shapes()) == {(3072, 3072): 266, (12288, 3072): 38, (3072, 12288): 38}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.device == "cpu" and name not in HEAVY])
def test_a_quick_row_is_complete(name: str) -> None:
    _check(ROWS[name], ROWS[name].measure(True))


def test_a_whole_training_step_has_its_peers() -> None:
    found = ROWS["step"].measure(True)
    _check(ROWS["step"], found)
    for one in found.details["models"].values():
        assert set(one["ratios"]) == {"frozen model", "qrlora", "peft LoRA", "peft, fp32 adapters"}


def _check(row: Row, found: Found) -> None:
    """A line of the table with nothing missing, of finite numbers, that survives its file."""
    assert found.measured
    assert bool(row.target) == bool(found.goals) == bool(found.limit or row.name == "switch")
    assert all(math.isfinite(goal.value) for goal in found.goals)
    numbers = list(_numbers(found.details))
    assert numbers
    assert all(math.isfinite(number) for number in numbers)
    result = table.result_of(row, found, {"machine": {}, "versions": {}})
    assert json.loads(json.dumps(result)) == result


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def test_growth_is_measured_at_every_point() -> None:
    found = growth.by_adapters(True)
    assert [point["at"] for point in found.details["points"]] == [1, 2]
    for point in found.details["points"]:
        assert set(point[growth.RATIO]) == set(point[growth.KEPT]) == {"frozen layer", "qrlora", "peft LoRA"}


def test_the_copy_reads_everything_and_the_merge_is_a_sum(tmp_path: Path) -> None:
    adapters = [adapter_of_size(disk.TINY, 4, seed) for seed in (1, 2)]
    files = [str(adapter.save(tmp_path / f"{i}.safetensors")) for i, adapter in enumerate(adapters)]
    sizes = [Path(file).stat().st_size for file in files]
    copy_bytes(files, str(tmp_path / "copy"), sum(sizes) - 5)
    assert (tmp_path / "copy").read_bytes() == (Path(files[0]).read_bytes() + Path(files[1]).read_bytes())[:-5]
    merge_files(files, str(tmp_path / "merged.safetensors"), "sum")
    for name, pair in read_adapter(tmp_path / "merged.safetensors").layers.items():
        first, second = (adapter.layers[name] for adapter in adapters)
        torch.testing.assert_close(pair.delta(), first.delta() + second.delta(), rtol=1e-5, atol=1e-7)


def test_a_process_that_fails_is_told() -> None:
    assert process_seconds(["-c", "print('said')"])[1] == "said\n"
    with pytest.raises(RuntimeError, match="ended with 3"):
        process_seconds(["-c", "raise SystemExit(3)"])


def test_without_the_script_its_row_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(script_row.VARIABLE, raising=False)
    with pytest.raises(NotHere, match=script_row.VARIABLE):
        script_row.measure(True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three rows: one that is measured (again and again, each time another number), one for a GPU, one that grows."""
    measured = count(1)
    seen: list[int] = []

    def measure(quick: bool) -> Found:
        seen.append(next(measured))
        return Found(f"{seen[-1]}", "peer 9", (Goal("number", seen[-1], 1),), "1 is the least", {"number": seen[-1]})

    rows = {
        "here": Row("here", "a number", "one", "at most 1", measure),
        "gpu": Row("gpu", "a number", "one", "at most 1", measure, "cuda"),
    }
    monkeypatch.setattr(command, "ROWS", rows)
    monkeypatch.setattr(table, "ROWS", rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return seen


def test_a_row_measured_again_replaces_itself_and_others_stay(
    small: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {"row": "gpu", "measured": "7", "peers": "", "limit": "", "goals": [], "details": {}}
    about = {"machine": command.machine() | {"gpu": "a card"}, "versions": {"torch": "2"}}
    table.write_result(kept | about, tmp_path)
    command.main((), output=tmp_path)
    command.main(("here",), output=tmp_path)
    results = table.read_results(tmp_path)
    assert small == [1, 2]
    assert (results["here"]["measured"], results["gpu"]["measured"]) == ("2", "7")
    page = (tmp_path / table.TABLE).read_text(encoding="utf-8")
    assert "0 of 1 met; not: number 2. Limit: 1 is the least" in page
    assert "| gpu | a number | one | at most 1 | 7 |" in page
    assert "`gpu`: a card" in page
    printed = capsys.readouterr().out
    assert "not measured now: no CUDA device" in printed
    assert "met" in printed


def test_quick_numbers_are_not_taken_for_results(
    small: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    command.main(("here",), quick=True, output=tmp_path / "results")
    assert small == [1]
    assert not (tmp_path / "results").exists()


def test_the_document_gets_the_table_between_its_markers(small: list[int], tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n", encoding="utf-8")
    table.write_table(tmp_path, document)
    page = document.read_text(encoding="utf-8")
    assert page.startswith(f"before\n{table.BEGIN}\n| row |")
    assert page.endswith(f"{table.END}\nafter\n")
    assert "old" not in page
    assert "no CUDA device" in page
    document.write_text("without", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the lines"):
        table.write_table(tmp_path, document)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    results = {
        name: table.result_of(ROWS[name], ROWS[name].measure(True), {"machine": {}, "versions": {}})
        for name in ("layer", "by-rank", "by-adapters")
    }
    draw_all(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"targets.png", "layer.png", "growth.png"}
