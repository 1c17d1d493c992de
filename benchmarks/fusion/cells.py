"""What is trained and drawn: adapters as tasks, merges as cells, and the prompts of both."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks.fusion.config import EVEN, EXACT, Method, Plan, Role, Stage, Weights
from benchmarks.fusion.scores import Pair
from benchmarks.fusion.splits import Splits
from benchmarks.fusion.teach import Lesson
from qrlora.adapter import AdapterSpec
from tools.emoji.dataset import Emoji

CONTENT_PROMPT = "a <c> emoji in {} style"
STYLE_PROMPT = "a {} emoji in <s> style"
MERGED_PROMPT = "a <c> emoji in <s> style"
_DRAW_SEED = 10_000


@dataclass(frozen=True)
class Task:
    """One adapter to be trained."""

    role: Role
    pictures: tuple[Pair, ...]
    spec: AdapterSpec
    rate: float
    steps: int
    seed: int
    training: tuple[tuple[str, Any], ...] = ()
    """Further fields of `TrainConfig`."""


@dataclass(frozen=True)
class Cell:
    """What is drawn for every pair: one method at one rate, merged one way.

    Attributes:
        method: its name.
        rate: learning rate of both adapters.
        shots: style pictures.
        merge: its name.
        weights: of content and style; 0 leaves an adapter out.
        steps: of the content adapter; the stage's where None.
    """

    method: str
    rate: float
    shots: int
    merge: str = EXACT
    weights: Weights = EVEN
    steps: int | None = None


@dataclass
class Layout:
    """Which tasks and pairs a stage has.

    Attributes:
        emoji: the data set.
        plan: what is compared.
        splits: contents, styles, prompts.
        stage: how much of it.
    """

    emoji: Emoji
    plan: Plan
    splits: Splits
    stage: Stage

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """Of this stage."""
        return self.splits.contents(self.stage.split)[: self.stage.contents]

    @cached_property
    def styles(self) -> tuple[str, ...]:
        """Of this stage."""
        return self.splits.styles[: self.stage.styles]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Contents by styles, the styles fastest."""
        return [(content, style) for content in self.contents for style in self.styles]

    def content_task(self, method: Method, rate: float, content: str, seed: int, steps: int | None = None) -> Task:
        """The adapter of one content picture."""
        stage = self.stage
        spec = method.spec("content", stage.rank, seed)
        pictures = ((content, self.splits.content_style),)
        return Task("content", pictures, spec, rate, steps or stage.steps.content, seed, _training(method, "content"))

    def style_task(self, method: Method, rate: float, style: str, shots: int, seed: int) -> Task:
        """The adapter of some pictures in one style."""
        spec = method.spec("style", self.stage.rank, seed)
        pictures = tuple((content, style) for content in self.splits.style_pictures(shots, seed))
        return Task("style", pictures, spec, rate, self.stage.steps.style[shots], seed, _training(method, "style"))

    def tasks(self, method: Method, rate: float, shots: Iterable[int]) -> list[Task]:
        """All adapters that merges of a method at a rate need."""
        seeds = self.stage.seeds
        found = [self.content_task(method, rate, c, seed) for seed in seeds for c in self.contents]
        return found + [self.style_task(method, rate, s, k, n) for n in seeds for k in shots for s in self.styles]

    def lesson(self, task: Task) -> Lesson:
        """The pictures and captions of a task."""
        if task.role == "content":
            captions = [CONTENT_PROMPT.format(style) for _, style in task.pictures]
        else:
            captions = [STYLE_PROMPT.format(self.emoji.name(content)) for content, _ in task.pictures]
        return Lesson([self.emoji[pair] for pair in task.pictures], captions)

    @property
    def count(self) -> int:
        """Pictures of a cell: pairs by seeds by draws, the draws fastest."""
        return len(self.pairs) * self.repeats

    @property
    def repeats(self) -> int:
        """Pictures of a cell's pair."""
        return len(self.stage.seeds) * self.stage.draws

    def picture_seed(self, index: int) -> int:
        """Of the noise that picture `index` of a cell starts from."""
        seed, draw = divmod(index % self.repeats, self.stage.draws)
        return self.stage.seeds[seed] + _DRAW_SEED * draw

    def tasks_of(self, cell: Cell, index: int) -> tuple[Task, Task]:
        """The content and the style adapter of one picture of a cell."""
        method = self.plan.method(cell.method)
        content, style = self.pairs[index // self.repeats]
        seed = self.stage.seeds[index % self.repeats // self.stage.draws]
        return (
            self.content_task(method, cell.rate, content, seed, cell.steps),
            self.style_task(method, cell.rate, style, cell.shots, seed),
        )


def _training(method: Method, role: Role) -> tuple[tuple[str, Any], ...]:
    found = method.training.get(role, {})
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in sorted(found.items()))
