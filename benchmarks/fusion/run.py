"""The stages: which cells are needed, and what is chosen from their scores."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.fusion.bench import STEP_WORK, Bench
from benchmarks.fusion.cells import Cell
from benchmarks.fusion.config import EVEN, EXACT, Weights
from benchmarks.fusion.draw import passes
from benchmarks.fusion.statistics import geometric
from qrlora.errors import QrloraWarning

Scores = Mapping[str, np.ndarray]
OBJECTIVE = (
    "geometric mean of the shares with the right content and with the right style, averaged over the numbers of style "
    "pictures; of equals, the one nearest to the true pictures (feature + look). A geometric mean, since an arithmetic "
    "one is half won by leaving an adapter out"
)


def objective(cells: Sequence[Scores]) -> tuple[float, float]:
    """What rates, weights and methods are chosen by, the larger the better."""
    shares = [float(geometric(np.stack([one["content"], one["style"]], axis=1))) for one in cells]
    near = [-float(one["feature"].mean() + one["look"].mean()) for one in cells]
    return round(sum(shares) / len(shares), 9), sum(near) / len(near)


def plan_work(bench: Bench, methods: Sequence[str]) -> float:
    """Passes of one picture that `screen_method` takes for these methods, as far as is known before."""
    stage, per_picture = bench.stage, passes(bench.model)
    seeds, shots = len(stage.seeds), len(stage.shots)
    step = STEP_WORK * stage.batch
    train = stage.contents * stage.steps.content + stage.styles * sum(stage.steps.style[k] for k in stage.shots)
    cell = bench.count * per_picture
    total = 0.0
    for name in methods:
        rates = len(stage.rates(bench.plan.method(name)))
        alone = (stage.contents + stage.styles * len(bench.splits.shown)) * seeds * per_picture
        total += rates * (seeds * step * train + shots * cell)
        total += shots * (alone + cell * (len(stage.weights) + 2 + (len(stage.keep) if name in stage.keep_of else 0)))
    return total


def screen_method(bench: Bench, name: str) -> dict[str, Any]:
    """One method on dev: its rates, its weights, and all that the table needs of the chosen ones."""
    stage, method = bench.stage, bench.plan.method(name)
    rates: dict[str, Any] = {}
    for rate in stage.rates(method):
        cells = [Cell(name, rate, shots) for shots in stage.shots]
        for each in stage.shots:  # all of a rate's adapters first, so that they are trained together
            bench.train(bench.tasks(method, rate, [each]))
        if any(bench.diverged(cell) for cell in cells):
            rates[f"{rate:g}"] = {"diverged": True}
            continue
        scores = [bench.scores(cell) for cell in cells]
        value = objective(scores)
        means = {str(cell.shots): summary(each) for cell, each in zip(cells, scores, strict=True)}
        rates[f"{rate:g}"] = {"objective": list(value), "shots": means}
    tried = {float(rate): each["objective"] for rate, each in rates.items() if "objective" in each}
    found: dict[str, Any] = {"method": name, "about": method.about, "rates": rates}
    if not tried:
        return found | {"rate": None}
    rate = max(tried, key=lambda each: tried[each])
    return found | {"rate": rate, "shots": {str(k): screen_shots(bench, name, rate, k) for k in stage.shots}}


def screen_shots(bench: Bench, name: str, rate: float, shots: int, merge: str = EXACT) -> dict[str, Any]:
    """A method at its rate from some style pictures: weights, drift, each adapter alone, fewer steps."""
    stage = bench.stage
    swept = stage.weights if merge == EXACT or stage.merge_weights is None else stage.merge_weights
    grid = (EVEN, *(swept if bench.plan.merge(merge).sweep else ()))
    frontier: list[tuple[Weights, Scores]] = [(w, bench.scores(Cell(name, rate, shots, merge, w))) for w in grid]
    best, scores = max(frontier, key=lambda each: objective([each[1]]))
    even = Cell(name, rate, shots, merge)
    found = {
        "even": lists(frontier[0][1]) | {"drift": rounded(bench.drift(even))},
        "weights": list(best),
        "best": lists(scores) | {"drift": rounded(bench.drift(Cell(name, rate, shots, merge, best)))},
        "frontier": [{"weights": list(weights), **summary(each)} for weights, each in frontier],
    }
    if merge != EXACT:
        return found | {"seconds": bench.seconds(even)}
    alone = bench.alone(name, rate, shots)
    keep = bench.stage.keep if name in bench.stage.keep_of else ()
    steps = {str(k): summary(bench.scores(Cell(name, rate, shots, steps=k))) for k in keep}
    return found | {"alone": {role: summary(each) for role, each in alone.items()}, "steps": steps}


def screen_merge(bench: Bench, name: str, rate: float, merge: str) -> dict[str, Any]:
    """Another merge of a method's adapters, at even and at its best weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QrloraWarning)
        return {str(shots): screen_shots(bench, name, rate, shots, merge) for shots in bench.stage.shots}


def tested_method(bench: Bench, chosen: Mapping[str, Any], merge: str, best: Mapping[str, Weights]) -> dict[str, Any]:
    """A method on test as it was chosen on dev: its rate, and for each number of style pictures its weights."""
    name, rate = str(chosen["method"]), float(chosen["rate"])
    shots: dict[str, Any] = {}
    for count in bench.stage.shots:
        bench.train(bench.tasks(bench.plan.method(name), rate, [count]))
        even, tuned = Cell(name, rate, count, merge), Cell(name, rate, count, merge, best[str(count)])
        shots[str(count)] = {
            "weights": list(tuned.weights),
            "even": lists(bench.scores(even)) | {"drift": rounded(bench.drift(even))},
            "best": lists(bench.scores(tuned)) | {"drift": rounded(bench.drift(tuned))},
            "alone": {role: summary(each) for role, each in bench.alone(name, rate, count).items()},
        }
    return {"method": name, "about": chosen["about"], "merge": merge, "rate": rate, "shots": shots}


def references(bench: Bench, through: Any) -> dict[str, Any]:
    """Ceilings and floors: true pictures, the same through the autoencoder, the base, and copies of what was given."""
    emoji, source = bench.emoji, bench.splits.content_style
    truth = emoji.pictures(bench.pairs)
    copies = {
        "true pictures": truth,
        "true pictures through the autoencoder": through(truth),
        "the content picture itself": emoji.pictures([(content, source) for content, _ in bench.pairs]),
        "the style picture itself": emoji.pictures([(bench.splits.taught[0], style) for _, style in bench.pairs]),
    }
    found = {name: lists(bench.given_scores(pictures, name)) for name, pictures in copies.items()}
    return found | {"the base, without adapters": lists(bench.base_scores())}


def summary(scores: Scores) -> dict[str, float]:
    """Means over pairs."""
    return {name: round(float(values.mean()), 5) for name, values in scores.items()}


def lists(scores: Scores) -> dict[str, list[float]]:
    """By pair, for JSON."""
    return {name: rounded(values) for name, values in scores.items()}


def rounded(values: np.ndarray) -> list[float]:
    """For JSON."""
    return [round(float(value), 5) for value in values]
