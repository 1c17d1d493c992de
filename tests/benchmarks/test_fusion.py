"""The fusion benchmark in small: two adapters, merged, scored, in a table; and a run that was stopped goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.fusion import bench as bench_module
from benchmarks.fusion import stages
from benchmarks.fusion.__main__ import main
from benchmarks.fusion.bench import Bench
from benchmarks.fusion.cells import Cell
from benchmarks.fusion.config import EVEN, Merge, Method, Plan, load_plan
from benchmarks.fusion.merges import merged
from benchmarks.fusion.publish import publish
from benchmarks.fusion.run import objective, plan_work, references, screen_method
from benchmarks.fusion.splits import Splits, derive, load, spread
from benchmarks.fusion.stages import Options, best_methods, write_results
from benchmarks.fusion.store import NotThereYet, Progress, Store, key_of
from qrlora.errors import QrloraError
from qrlora.merging import merge
from tools.emoji.dataset import Emoji

STAGE = {
    "split": "dev",
    "contents": 1,
    "styles": 1,
    "seeds": [0],
    "shots": [1],
    "steps": {"content": 1, "style": {"1": 1}},
    "batch": 1,
    "rank": 2,
    "weights": [],
}


def test_a_screen_trains_merges_scores_and_writes_its_table(bench: Bench, tmp_path: Path) -> None:
    found = {name: screen_method(bench, name) for name in ("qr", "qr-r1", "lora", "gated")}
    assert set(found["qr"]["rates"]) == {"0.01", "0.02"}
    part = found["qr"]["shots"]["1"]
    assert len(part["even"]["content"]) == 2
    assert set(part["even"]) == {"content", "style", "both", "feature", "pixels", "look", "drift"}
    assert [point["weights"] for point in part["frontier"]] == [[1.0, 1.0], [0.5, 1.0]]
    assert part["weights"] in ([1.0, 1.0], [0.5, 1.0])
    options = Options(tmp_path, tmp_path, tmp_path / "results", command="python -m benchmarks.fusion screen")
    path = options.result("screen")
    write_results(path, bench, options, found, {"references": references(bench, lambda pictures: pictures)})
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["base"] == bench.base
    assert set(results["references"]["true pictures"]["content"]) == {1.0}
    assert results["references"]["true pictures"]["pixels"] == [0.0, 0.0]
    bench.compute = False
    document = tmp_path / "fusion.md"
    document.write_text("before\n<!-- screen -->\nold\n<!-- /screen -->\nafter\n", encoding="utf-8")
    written = publish(bench, results, options.results, "screen", document)
    assert {file.suffix for file in written} == {".md", ".png"}
    assert all(file.stat().st_size > 0 for file in written)
    assert {"screen-frontier-1.png", "screen-steps-1.png", "screen-rank-1.png"} <= {file.name for file in written}
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    line = next(line for line in text.splitlines() if line.startswith("| **qr**: small | 1, 1"))
    assert f"{np.mean(part['even']['content']):.2f} [" in line
    less = np.mean(part["even"]["feature"]) - np.mean(found["lora"]["shots"]["1"]["even"]["feature"])
    assert f"{less:+.2f} [" in line
    full = (options.results / "screen.md").read_text(encoding="utf-8")
    assert "python -m benchmarks.fusion screen" in full
    assert full.count("| qr | 1 | contents | ") == 1
    assert "| qr | 1 | styles | " not in full  # of one style there is no spread
    assert f"{np.mean(part['even']['feature']):.2f} [" in full


def test_a_stopped_screen_goes_on_and_ends_as_an_uninterrupted_one(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = screen_method(bench, "lora")
    bench.store = Store(tmp_path / "other")
    calls: list[int] = []
    teach: Callable[..., Any] = bench_module.teach

    def counted(*args: Any, **given: Any) -> Any:
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return teach(*args, **given)

    monkeypatch.setattr(bench_module, "teach", counted)
    with pytest.raises(KeyboardInterrupt):
        screen_method(bench, "lora")
    assert screen_method(bench, "lora") == whole
    assert calls == [2, 1, 1]  # both contents, then the style that was stopped, then the style alone
    bench.compute = False
    assert screen_method(bench, "lora") == whole
    with pytest.raises(NotThereYet):
        screen_method(bench, "qr")


def test_an_adapter_of_other_settings_is_another_one(bench: Bench) -> None:
    method = bench.plan.method("qr")
    task = bench.content_task(method, 0.01, bench.contents[0], 0)
    others = [
        bench.content_task(method, 0.02, bench.contents[0], 0),
        bench.content_task(method, 0.01, bench.contents[1], 0),
        bench.content_task(method, 0.01, bench.contents[0], 1),
        bench.content_task(bench.plan.method("lora"), 0.01, bench.contents[0], 0),
        bench.content_task(method, 0.01, bench.contents[0], 0, steps=1),
    ]
    keys = {bench.task_key(each) for each in (task, *others)}
    assert len(keys) == 6
    assert bench.task_key(task) in keys
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})


def test_plain_lora_starts_apart_by_role_and_a_basis_does_not() -> None:
    lora = Method(about="", adapter={"basis": "lora"}, learning_rates=(0.1,))
    random = Method(about="", adapter={"basis": "random"}, learning_rates=(0.1,))
    assert lora.spec("content", 4, 3).seed != lora.spec("style", 4, 3).seed
    assert random.spec("content", 4, 3).seed == random.spec("style", 4, 3).seed == 0


def test_a_merge_that_learns_is_told_what_its_adapters_draw(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    way = Merge(about="learned", method="zip", options={"steps": 1, "pictures": 1}, on_base=True, sweep=False)
    bench.plan.merges["learned"] = way
    bench.train(bench.tasks(bench.plan.method("lora"), 0.01, [1]))
    cell = Cell("lora", 0.01, 1, "learned")
    assert bench.scores(cell)["content"].shape == (2,)
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.fusion.bench.merged", None)  # drift is of the merges that were learned already
        assert bench.drift(cell).shape == (2,)
    content, style = bench.tasks_of(cell, 0)
    prompts = [bench.lesson(content).captions[0], bench.lesson(style).captions[0]]
    assert prompts[0] == "a <c> emoji in noto style"
    assert prompts[1].endswith(" emoji in <s> style")
    parts = [part for task in (content, style) if (part := bench.store.adapter(bench.task_key(task))) is not None]
    whole = merged(way, parts, EVEN, bench.model, prompts)
    theirs = merge(parts, [1.0, 1.0], "zip", model=bench.model, prompts=prompts, **way.options)
    for layer, pair in whole.layers.items():
        assert torch.equal(pair.delta(), theirs.layers[layer].delta())


def test_pictures_of_a_cell_are_those_of_its_merge(bench: Bench) -> None:
    """Against the library's own way: merge the files, attach, generate."""
    from qrlora.adapter import attach_adapter, remove_adapter

    bench.train(bench.tasks(bench.plan.method("lora"), 0.01, [1]))
    cell = Cell("lora", 0.01, 1, weights=(2.0, 0.5))
    pictures = bench.pictures(cell)
    content, style = bench.tasks_of(cell, 2)
    parts = [bench.store.adapter(bench.task_key(task)) for task in (content, style)]
    assert all(part is not None for part in parts)
    whole = merged(
        bench.plan.merge("exact"), [part for part in parts if part is not None], (2.0, 0.5), bench.model, ["", ""]
    )
    for layer, pair in whole.layers.items():
        deltas = [part.layers[layer].delta().double() for part in parts if part is not None]
        assert np.allclose(pair.delta(), 2 * deltas[0] + 0.5 * deltas[1], atol=1e-7)
    model = bench.model
    attach_adapter(model.denoiser, whole, "whole")
    settings = model.defaults.model_dump()
    alone = model.family.generate(model.pipeline, ["a <c> emoji in <s> style"], seeds=[0], **settings)[0]
    remove_adapter(model.denoiser, "whole")
    assert np.abs(pictures[2].astype(int) - np.asarray(alone)).max() <= 1
    assert np.abs(pictures[3].astype(int) - np.asarray(alone)).max() > 1  # the same adapters from another noise


def test_the_objective_wants_both_and_breaks_ties_by_nearness() -> None:
    def scores(content: float, style: float, feature: float = 1.0) -> dict[str, np.ndarray]:
        values = {"content": content, "style": style, "feature": feature, "look": 0.5}
        return {name: np.full(4, value) for name, value in values.items()}

    assert objective([scores(0.5, 0.5)]) > objective([scores(1.0, 0.0)])
    assert objective([scores(0.25, 1.0)])[0] == pytest.approx(0.5)
    assert objective([scores(0.5, 0.5), scores(0.0, 1.0)])[0] == pytest.approx(0.25)
    assert objective([scores(0, 1, feature=0.4)]) > objective([scores(1, 0, feature=0.6)])


def test_the_best_go_on_with_plain_lora_and_without_what_diverged(plan: Plan) -> None:
    def entry(value: float) -> dict[str, Any]:
        return {"rate": 0.01, "rates": {"0.01": {"objective": [value, 0.0]}}}

    methods = {"qr": entry(0.3), "lora": entry(0.1), "gated": entry(0.9), "gone": {"rate": None}}
    assert best_methods(methods, 1, plan) == ["qr", "lora"]
    assert best_methods(methods, 1, plan, runtime=True) == ["gated", "lora"]
    assert best_methods(methods, 5, plan, runtime=True) == ["gated", "qr", "lora"]


def test_the_work_that_is_planned_is_the_work_that_is_done(bench: Bench) -> None:
    screen_method(bench, "qr")
    assert bench.progress.computed <= plan_work(bench, ["qr"])
    assert bench.progress.computed >= 0.7 * plan_work(bench, ["qr"])


def test_progress_tells_what_is_left() -> None:
    said: list[str] = []
    progress = Progress(every=0, say=said.append)
    progress.plan(100)
    progress.found(50)
    progress.step(10, "training")
    assert said[0].startswith("training: 60% done")
    assert "about 2 min left" in progress.line(elapsed=30)  # 10 took half a minute, 40 are left


def test_the_committed_plan_is_valid_and_every_method_has_its_adapters() -> None:
    plan = load_plan()
    kinds = {name: method.spec("content", 16, 0) for name, method in plan.methods.items()}
    assert kinds["qr"].mask == "full"
    assert kinds["qr-upper"].mask == "upper"
    assert kinds["lora-half"].rank * 2 == kinds["lora"].rank == 16
    assert plan.method("gated").runtime
    assert plan.method("dora").runtime
    assert not plan.method("qr-bands").runtime
    assert plan.method("qr-bands").spec("style", 16, 0).band == "1/2"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("methods", {"x": {"about": "", "adapter": {"basis": "qqr"}, "learning_rates": [1]}}, "x has no valid content"),
        ("methods", {"x": {"about": "", "adapter": {}, "learning_rates": []}}, r"methods\.x\.learning_rates"),
        ("merges", {"x": {"about": "", "method": "tiess"}}, "no merge method 'tiess'"),
        ("stages", {"x": {"split": "train"}}, r"stages\.x"),
        ("stages", {"x": STAGE | {"shots": [1, 4]}}, "no entry for 4 style pictures"),
    ],
)
def test_a_wrong_entry_is_told_by_its_name(file: str, change: Any, message: str, tmp_path: Path) -> None:
    for name in ("methods", "merges", "stages"):
        text = json.dumps(change if name == file else {})
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    with pytest.raises(QrloraError, match=message):
        load_plan(tmp_path)


def test_unknown_names_and_missing_files_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["screen", "--data", str(tmp_path / "none.npz"), "--work", str(tmp_path)]) == 2
    assert "there is no data set" in capsys.readouterr().err
    assert main(["screen", "--methods", "qrr", "--work", str(tmp_path)]) == 2
    assert "there is no method 'qrr'; known are" in capsys.readouterr().err
    assert main(["test", "--results", str(tmp_path), "--work", str(tmp_path)]) == 2
    assert "there are no results" in capsys.readouterr().err
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert "there are no results" in capsys.readouterr().err
    with pytest.raises(QrloraError, match="no stage 'huge'"):
        load_plan().stage("huge")


def test_the_splits_keep_dev_test_and_known_contents_apart() -> None:
    splits = load()
    assert not set(splits.dev) & set(splits.test)
    known = {*splits.taught, *splits.shown, *(content for content, _ in splits.unrelated)}
    assert not known & {*splits.dev, *splits.test}
    assert not set(splits.taught) & set(splits.shown)
    assert splits.content_style not in splits.styles
    assert (len(splits.dev), len(splits.test), len(splits.styles)) == (12, 60, 5)
    assert splits.style_pictures(8, 0) == splits.taught
    assert splits.style_pictures(1, 2) == splits.taught[2:3]
    with pytest.raises(QrloraError, match="9 style pictures are asked for"):
        splits.style_pictures(9, 0)


@pytest.mark.skipif(not Path("data/emoji.npz").exists(), reason="the data set is not here")
def test_the_committed_splits_are_those_of_the_data_set() -> None:
    emoji = Emoji.load(Path("data/emoji.npz"))
    assert derive(emoji) == load()
    load().check(emoji)


def test_a_data_set_without_a_picture_of_the_splits_is_refused(emoji: Emoji, splits: Splits) -> None:
    splits.check(emoji)
    other = splits.model_copy(update={"dev": (*splits.dev, "fff")})
    with pytest.raises(QrloraError, match="no picture of fff in noto"):
        other.check(emoji)


def test_every_beginning_of_a_spread_is_spread_out() -> None:
    items = [str(i) for i in range(16)]
    assert sorted(spread(items, 8), key=int) == items[::2]
    assert set(spread(items, 8)[:2]) == {"0", "8"}
    assert set(spread(items, 8)[:4]) == {"0", "4", "8", "12"}
    with pytest.raises(QrloraError, match="17 contents are needed and 16 are drawn"):
        spread(items, 17)


def test_stages_are_what_the_command_line_offers() -> None:
    assert set(stages.STAGES) == {"splits", "screen", "merges", "test", "report"}
    options = Options(Path("a"), Path("b"), Path("c"), contents=3, seeds=[4])
    stage = options.stage(load_plan(), "screen")
    assert (stage.contents, stage.seeds) == (3, (4,))
    assert EVEN == (1.0, 1.0)


def test_parts_of_the_network_and_ranges_of_timesteps_are_a_methods_own(bench: Bench) -> None:
    method = Method(
        about="parts apart",
        adapter={"basis": "qr", "rank": 2},
        content={"blocks": "transformer_blocks"},
        style={"blocks": "single_transformer_blocks.2-3"},
        training={"style": {"max_timestep": 500}},
        learning_rates=(0.01,),
    )
    bench.plan.methods["apart"] = method
    plain = method.model_copy(update={"training": {}})
    style = bench.splits.styles[0]
    tasks = [bench.style_task(each, 0.01, style, 1, 0) for each in (method, plain)]
    assert bench.task_key(tasks[0]) != bench.task_key(tasks[1])
    assert tasks[0].training == (("max_timestep", 500),)
    cell = Cell("apart", 0.01, 1)
    bench.train(bench.tasks(method, 0.01, [1]))
    parts = [bench.store.adapter(bench.task_key(task)) for task in bench.tasks_of(cell, 0)]
    whole = merged(bench.plan.merge("exact"), [part for part in parts if part is not None], EVEN, bench.model, ["", ""])
    layers = [set(part.layers) for part in parts if part is not None]
    assert not layers[0] & layers[1]
    assert set(whole.layers) == layers[0] | layers[1]
    assert bench.scores(cell)["content"].shape == (2,)
