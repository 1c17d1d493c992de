"""What each stage of the command line does: open, compute in an order, write results."""

import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.fusion import splits as split_files
from benchmarks.fusion.bench import Bench, hash_of
from benchmarks.fusion.config import EXACT, Plan, Stage, checked, load_plan, read_json
from benchmarks.fusion.publish import publish, publish_merges
from benchmarks.fusion.run import (
    OBJECTIVE,
    plan_work,
    references,
    screen_merge,
    screen_method,
    tested_method,
)
from benchmarks.fusion.scores import make_scorer
from benchmarks.fusion.store import NotThereYet, Store
from qrlora import starter
from qrlora.errors import QrloraError
from qrlora.formats import atomic_write
from qrlora.models import load_pipeline
from tools.emoji.dataset import Emoji

LORA = "lora"


@dataclass(frozen=True)
class Options:
    """What the command line was told; see there."""

    data: Path
    work: Path
    results: Path
    command: str = ""
    size: str | None = None
    methods: list[str] | None = None
    merges: list[str] | None = None
    best: int = 4
    contents: int | None = None
    seeds: list[int] | None = None
    cached: bool = False

    def stage(self, plan: Plan, name: str) -> Stage:
        """The stage's size with the command line's changes."""
        stage = plan.stage(self.size or name)
        changes = {"contents": self.contents, "seeds": None if self.seeds is None else tuple(self.seeds)}
        return stage.model_copy(update={key: value for key, value in changes.items() if value is not None})

    def result(self, name: str) -> Path:
        """Where a stage's results lie."""
        return self.results / f"{name}.json"


def write_splits(options: Options) -> None:
    """Derive the splits anew from the data set."""
    made = split_files.derive(open_emoji(options.data))
    text = json.dumps(made.model_dump(mode="json"), indent=1)
    print(f"wrote {atomic_write(split_files.PATH, text + chr(10))}")


def screen(options: Options) -> None:
    """Every method on dev; the results are written after each."""
    plan = load_plan()
    names = options.methods or list(plan.methods)
    for name in names:
        plan.method(name)
    bench, through = open_bench(options, plan, options.stage(plan, "screen"))
    path = options.result(options.size or "screen")
    found: dict[str, Any] = {}
    bench.progress.plan(plan_work(bench, names))
    for name in names:
        try:
            found[name] = screen_method(bench, name)
        except NotThereYet:
            continue
        write_results(path, bench, options, found, {"references": references(bench, through), "objective": OBJECTIVE})
    if not found:
        raise QrloraError("nothing of this screen is in the store yet; run it without --cached.")


def screen_merges(options: Options) -> None:
    """Every way to merge, on the adapters of the best methods and of plain LoRA."""
    plan, size = load_plan(), options.size or "screen"
    before = read_results(options.result(size))
    bench, _ = open_bench(options, plan, options.stage(plan, "screen"))
    names = options.methods or best_methods(before["methods"], options.best, plan)
    found: dict[str, Any] = {}
    for name in names:
        rate = before["methods"][name]["rate"]
        for merge in options.merges or [each for each in plan.merges if each != EXACT]:
            try:
                found.setdefault(name, {})[merge] = screen_merge(bench, name, rate, merge)
            except NotThereYet:
                continue
            write_results(options.result(f"{size}-merges"), bench, options, found, {})


def test(options: Options) -> None:
    """The best methods of the screen and plain LoRA on test, as dev chose them."""
    plan, size = load_plan(), options.size or "test"
    before = read_results(options.result("screen"))
    names = options.methods or best_methods(before["methods"], options.best, plan, runtime=True)
    bench, through = open_bench(options, plan, options.stage(plan, "test"))
    found: dict[str, Any] = {}
    bench.progress.plan(plan_work(bench, names) / 2)
    for name in names:
        chosen = before["methods"][name]
        weights = {count: (each["weights"][0], each["weights"][1]) for count, each in chosen["shots"].items()}
        try:
            found[name] = tested_method(bench, chosen, EXACT, weights)
        except NotThereYet:
            continue
        write_results(options.result(size), bench, options, found, {"references": references(bench, through)})


def best_methods(methods: Mapping[str, Any], count: int, plan: Plan, runtime: bool = False) -> list[str]:
    """The best by the objective on dev, and plain LoRA.

    Args:
        methods: of a screen's results.
        count: how many.
        plan: tells which cannot be merged.
        runtime: whether those count.
    """
    usable = {name: each for name, each in methods.items() if each["rate"] is not None}
    usable = {name: each for name, each in usable.items() if runtime or not plan.method(name).runtime}

    def value(name: str) -> list[float]:
        return usable[name]["rates"][f"{usable[name]['rate']:g}"]["objective"]

    names = sorted(usable, key=value, reverse=True)[:count]
    return names + [LORA for _ in range(1) if LORA in usable and LORA not in names]


def report(options: Options) -> None:
    """Tables and plots of the results that are there."""
    plan = load_plan()
    found = [name for name in ([options.size] if options.size else plan.stages) if options.result(name).exists()]
    if not found:
        raise QrloraError(f"there are no results in {options.results}; run a stage first.")
    for name in found:
        results = read_results(options.result(name))
        stage = checked(Stage, results["stage"], str(options.result(name)))
        bench, _ = open_bench(options, plan, stage, compute=False)
        for path in publish(bench, results, options.results, name):
            print(f"wrote {path}")
        if options.result(f"{name}-merges").exists():
            merges = read_results(options.result(f"{name}-merges"))
            print(f"wrote {publish_merges(bench, merges, results, options.results, name)}")


STAGES: dict[str, Callable[[Options], None]] = {
    "splits": write_splits,
    "screen": screen,
    "merges": screen_merges,
    "test": test,
    "report": report,
}


def open_emoji(path: Path) -> Emoji:
    """Raises QrloraError: no data set there."""
    if not path.exists():
        raise QrloraError(f"there is no data set {path}; make it with python -m tools.emoji.build, or give --data.")
    return Emoji.load(path)


def open_bench(options: Options, plan: Plan, stage: Stage, *, compute: bool = True) -> tuple[Bench, Any]:
    """All that a stage works on, and the way through the base's autoencoder."""
    from tools.emoji.scores import Features
    from tools.starter.score import there_and_back

    emoji, chosen = open_emoji(options.data), split_files.load()
    chosen.check(emoji)
    model = load_pipeline(starter.path())
    if stage.inference_steps is not None:
        model.defaults = model.defaults.model_copy(update={"num_inference_steps": stage.inference_steps})
    store, through = Store(options.work / hash_of(model)[:12]), there_and_back(model)
    candidates = emoji.dev_contents if stage.split == "dev" else emoji.test_contents
    judged = [*candidates, *chosen.taught, *chosen.shown]
    scorer = make_scorer(emoji, Features(), judged, candidates, through, store.folder)
    compute = compute and not options.cached
    bench = Bench(emoji, plan, chosen, stage, model=model, store=store, scorer=scorer, compute=compute)
    return bench, through


def write_results(
    path: Path, bench: Bench, options: Options, found: Mapping[str, Any], more: Mapping[str, Any]
) -> None:
    """What was found so far, with all it depends on."""
    about = {
        "command": options.command,
        "base": bench.base,
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "stage": bench.stage.model_dump(mode="json"),
        "pairs": [list(pair) for pair in bench.pairs],
        "candidates": len(bench.scorer.candidates),
        "classifier": {"true": bench.scorer.judge.accuracy, "shown": bench.scorer.judge.accuracy_shown},
    }
    text = json.dumps({**about, **more, "methods": found}, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()), text)  # numbers by pair in one line
    atomic_write(path, text + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """Raises QrloraError: the stage was not run."""
    if not path.exists():
        raise QrloraError(f"there are no results {path}; run the stage that makes them first.")
    return read_json(path)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {name: version(name) for name in ("torch", "diffusers", "peft", "transformers", "numpy")}
