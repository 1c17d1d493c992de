"""Adapters, pictures and scores on demand: taken from the store, else computed and kept."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from benchmarks.fusion.cells import CONTENT_PROMPT, MERGED_PROMPT, STYLE_PROMPT, Cell, Layout, Task
from benchmarks.fusion.config import role_seed
from benchmarks.fusion.draw import Picture, draw, passes
from benchmarks.fusion.merges import merged, schedule_of
from benchmarks.fusion.precision import computing
from benchmarks.fusion.scores import Pair, Scorer
from benchmarks.fusion.store import NotThereYet, Progress, Store, digest, key_of
from benchmarks.fusion.teach import configuration, teach
from qrlora.adapter import AdapterSpec, base_hash, target_layers
from qrlora.formats import Adapter
from qrlora.models import LoadedModel

STEP_WORK = 3
"""A training step in passes of one picture: forward, and twice that backward."""


@dataclass
class Bench(Layout):
    """Everything the stages work on.

    Attributes:
        model: the base.
        store: of this base.
        scorer: of pictures.
        progress: told of all work.
        compute: whether to compute what is not in the store, or raise `NotThereYet`.
    """

    model: LoadedModel
    store: Store
    scorer: Scorer
    progress: Progress = field(default_factory=Progress)
    compute: bool = True
    _learned: dict[Cell, dict[int, Adapter]] = field(default_factory=dict[Cell, dict[int, Adapter]])

    @cached_property
    def base(self) -> str:
        """Hash of the adapted weights of the base."""
        return hash_of(self.model)

    @property
    def _precision(self) -> dict[str, str]:
        """For keys; what is there already was computed in float32."""
        return {} if self.stage.precision == "float32" else {"precision": self.stage.precision}

    def task_key(self, task: Task) -> str:
        """What an adapter depends on."""
        lesson = self.lesson(task)
        return key_of(
            {
                **({"training": dict(task.training)} if task.training else {}),
                **self._precision,
                "base": self.base,
                "spec": task.spec.model_dump(mode="json"),
                "rate": task.rate,
                "steps": task.steps,
                "batch": self.stage.batch,
                "seed": role_seed(task.role, task.seed),
                "pictures": digest(np.stack(lesson.pictures)),
                "captions": list(lesson.captions),
            }
        )

    def train(self, tasks: Sequence[Task]) -> None:
        """Train what is not in the store, equal kinds together."""
        groups: dict[Any, list[Task]] = {}
        for task in tasks:
            work = STEP_WORK * task.steps * self.stage.batch
            if self.store.has_adapter(self.task_key(task)):
                self.progress.found(work)
            else:
                kind = (task.role, task.spec.model_dump_json(), task.rate, task.steps, task.seed, task.training)
                groups.setdefault(kind, []).append(task)
        if groups and not self.compute:
            raise NotThereYet
        for group in groups.values():
            for start in range(0, len(group), self.stage.together):
                self._train_together(group[start : start + self.stage.together])

    def _train_together(self, tasks: Sequence[Task]) -> None:
        first, batch = tasks[0], self.stage.batch
        seed = role_seed(first.role, first.seed)
        config = configuration(first.spec, first.rate, first.steps, batch, seed, **dict(first.training))
        work, what = STEP_WORK * batch * len(tasks), f"{first.role} adapters, {_words(first.spec)} at {first.rate:g}"
        keep = self.stage.keep if first.role == "content" else ()  # of all methods: adapters are small
        lessons = [self.lesson(task) for task in tasks]
        with computing(self.model.denoiser, self.stage.precision):
            kept = teach(self.model, config, lessons, keep=keep, on_step=lambda _: self.progress.step(work, what))
        for step in sorted(kept):  # the last step comes last: where it is, the others are
            for task, taught in zip(tasks, kept[step], strict=True):
                key = self.task_key(replace(task, steps=step))
                self.store.put_adapter(key, taught.adapter, taught.losses)

    def diverged(self, cell: Cell) -> bool:
        """Whether an adapter of the cell's method at its rate is not finite; trains them first."""
        tasks = self.tasks(self.plan.method(cell.method), cell.rate, [cell.shots])
        self.train(tasks)
        return any(self.store.adapter(self.task_key(task)) is None for task in tasks)

    def scores(self, cell: Cell) -> dict[str, np.ndarray]:
        """`[pairs]` by score, the mean over seeds."""
        return self._scored(self._cell_keys(cell), self.pictures(cell), self.pairs, self.repeats)

    def pictures(self, cell: Cell) -> np.ndarray:
        """uint8 `[pairs * seeds, H, W, 3]`."""
        return self._pictures(f"merges of {cell.method}", self._cell_keys(cell), lambda i: self._merged(cell, i))

    def drift(self, cell: Cell) -> np.ndarray:
        """`[pairs]`: how far a picture of an unrelated prompt moves from the base's, each pair with the next prompt."""
        unrelated = [self.splits.unrelated[i % len(self.splits.unrelated)] for i in range(self.count)]
        prompts = [f"a {self.emoji.name(content)} emoji in {style} style" for content, style in unrelated]
        keys = {**self._cell_keys(cell), "prompts": prompts}

        def picture(index: int) -> Picture:
            return replace(self._merged(cell, index), prompt=prompts[index], seed=0)

        made = self._pictures(f"drift of {cell.method}", keys, picture)
        before = self.base_pictures(prompts, [0] * self.count)
        key = key_of({"drift": keys})
        moved = self.store.json("scores", key)
        if moved is None:
            moved = self.scorer.moved(made, before, [style for _, style in unrelated])
            self.store.put_json("scores", key, moved)
        return _by_pair(moved, self.repeats)

    def alone(self, method: str, rate: float, shots: int) -> dict[str, dict[str, np.ndarray]]:
        """Scores of each adapter alone: the content in its training style, known contents in the style."""
        kind, seeds = self.plan.method(method), self.stage.seeds
        contents = [(c, self.splits.content_style) for c in self.contents]
        first = [self.content_task(kind, rate, c, seed) for c in self.contents for seed in seeds]
        shown = [(c, s) for s in self.styles for c in self.splits.shown]
        second = [self.style_task(kind, rate, s, shots, seed) for _, s in shown for seed in seeds]
        found: dict[str, dict[str, np.ndarray]] = {}
        for role, pairs, tasks in (("content", contents, first), ("style", shown, second)):
            prompts = [
                (CONTENT_PROMPT.format(s) if role == "content" else STYLE_PROMPT.format(self.emoji.name(c)))
                for c, s in pairs
                for _ in seeds
            ]
            keys = {"alone": [self.task_key(task) for task in tasks], "prompts": prompts, "base": self.base}

            def picture(i: int, prompts: list[str] = prompts, tasks: list[Task] = tasks) -> Picture:
                return Picture(prompts[i], tasks[i].seed, ((self._adapter(tasks[i]), 1.0),))

            made = self._pictures(f"adapters of {method} alone", keys, picture, len(prompts))
            found[role] = self._scored(keys, made, pairs, len(seeds), None if role == "content" else self.splits.shown)
        return found

    def base_scores(self) -> dict[str, np.ndarray]:
        """The floor: the base asked for the merge, without adapters."""
        seeds = [self.picture_seed(index) for index in range(self.count)]
        made = self.base_pictures([MERGED_PROMPT] * len(seeds), seeds)
        return self._scored({"floor": self.base, "seeds": seeds}, made, self.pairs, self.repeats)

    def given_scores(self, pictures: np.ndarray, name: str) -> dict[str, np.ndarray]:
        """Scores of given pictures, one a pair: the ceilings, and copies of what was given."""
        return self._scored({name: digest(pictures)}, pictures, self.pairs, 1)

    def base_pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Of the base alone; each prompt and seed is drawn once."""
        once = sorted(set(zip(prompts, seeds, strict=True)))
        made = self._pictures(
            "the base", {"base": self.base, "drawn": once}, lambda i: Picture(once[i][0], once[i][1]), len(once)
        )
        return made[[once.index(each) for each in zip(prompts, seeds, strict=True)]]

    def _cell_keys(self, cell: Cell) -> dict[str, Any]:
        tasks = [task for i in range(self.count) for task in self.tasks_of(cell, i)]
        return {
            "adapters": [self.task_key(task) for task in tasks],
            "merge": self.plan.merge(cell.merge).key(),
            "weights": list(cell.weights),
            **({"draws": self.stage.draws} if self.stage.draws > 1 else {}),
        }

    def seconds(self, cell: Cell, count: int = 3) -> float:
        """Median of the seconds of merging the first pairs, as they were when this was first asked."""
        key = key_of({"seconds": self._cell_keys(cell), "count": count})
        found = self.store.json("seconds", key)
        if found is None:
            if not self.compute:
                raise NotThereYet
            found = [self._timed(cell, index * self.repeats) for index in range(min(count, len(self.pairs)))]
            self.store.put_json("seconds", key, found)
        return float(np.median(found))

    def _timed(self, cell: Cell, index: int) -> float:
        adapters, way = [self._adapter(task) for task in self.tasks_of(cell, index)], self.plan.merge(cell.merge)
        started = time.perf_counter()
        if way.runtime:
            schedule_of(way, adapters)
        else:
            self._merge(cell, index, adapters)
        return round(time.perf_counter() - started, 4)

    def _merged(self, cell: Cell, index: int) -> Picture:
        method, merge = self.plan.method(cell.method), self.plan.merge(cell.merge)
        tasks = self.tasks_of(cell, index)
        adapters = [self._adapter(task) for task in tasks]
        seed, weights = self.picture_seed(index), cell.weights
        if method.runtime or merge.runtime:
            both = tuple(zip(adapters, weights, strict=True))
            return Picture(MERGED_PROMPT, seed, both, schedule_of(merge, adapters))
        if not merge.on_base:
            return Picture(MERGED_PROMPT, seed, ((self._merge(cell, index, adapters), 1.0),))
        # Learning takes longer than drawing, and drift is drawn with the same merges: the last cell's are kept.
        if cell not in self._learned:
            self._learned = {cell: {}}
        made = self._learned[cell]
        if index not in made:
            made[index] = self._merge(cell, index, adapters)
        return Picture(MERGED_PROMPT, seed, ((made[index], 1.0),))

    def _merge(self, cell: Cell, index: int, adapters: Sequence[Adapter]) -> Adapter:
        # The store's adapters do not say what they were trained on; one caption of each is what the library asks for.
        prompts = [self.lesson(task).captions[0] for task in self.tasks_of(cell, index)]
        return merged(self.plan.merge(cell.merge), adapters, cell.weights, self.model, prompts)

    def _adapter(self, task: Task) -> Adapter:
        adapter = self.store.adapter(self.task_key(task))
        if adapter is None:
            raise NotThereYet
        return adapter

    def _pictures(self, what: str, keys: dict[str, Any], picture: Any, count: int | None = None) -> np.ndarray:
        number = self.count if count is None else count
        settings = {**self.model.defaults.model_dump(), **self._precision}
        key, work = key_of({"pictures": keys, "settings": settings}), passes(self.model)
        found = self.store.pictures(key)
        if found is not None:
            self.progress.found(work * number)
            return found
        if not self.compute:
            raise NotThereYet
        on_drawn = partial(self._drawn, work, what)
        with computing(self.model.denoiser, self.stage.precision):
            made = draw(self.model, [picture(i) for i in range(number)], on_drawn=on_drawn)
        self.store.put_pictures(key, made)
        return made

    def _drawn(self, work: int, what: str, count: int) -> None:
        self.progress.step(work * count, what)

    def _scored(
        self,
        keys: dict[str, Any],
        pictures: np.ndarray,
        pairs: Sequence[Pair],
        repeats: int,
        candidates: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """By pair, each with `repeats` pictures; among the scorer's candidates where None."""
        among = list(self.scorer.candidates if candidates is None else candidates)
        pairs = [pair for pair in pairs for _ in range(repeats)]
        key = key_of({"scores": keys, "pairs": pairs, "candidates": among, "seen": digest(pictures)})
        found = self.store.json("scores", key)
        if found is None:
            found = self.scorer(pictures, pairs, among)
            self.store.put_json("scores", key, found)
        return {name: _by_pair(values, repeats) for name, values in found.items()}


def _by_pair(values: Sequence[float], repeats: int) -> np.ndarray:
    """The mean over the pictures of each pair, which stand together."""
    return np.asarray(values, dtype=float).reshape(-1, repeats).mean(axis=1)


def hash_of(model: LoadedModel) -> str:
    """Of the base's adapted weights."""
    return base_hash(model.denoiser, target_layers(model.denoiser, "auto"))


def _words(spec: AdapterSpec) -> str:
    parts = [spec.basis, f"rank {spec.rank}", spec.band and f"band {spec.band}", spec.side == "input" and "input side"]
    return " ".join(part for part in parts if part)
