"""What is compared, how much of it, and on what: the data files beside the code, checked as they are read."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmarks.fusion.precision import Precision
from qrlora.adapter import AdapterSpec, TimestepRange, check_spec
from qrlora.adapter.forms import form_of
from qrlora.errors import QrloraError
from qrlora.merging import merge_names, run_time_names

HERE = Path(__file__).parent
Role = Literal["content", "style"]
ROLES: tuple[Role, Role] = ("content", "style")
EXACT = "exact"
Weights = tuple[float, float]
EVEN: Weights = (1.0, 1.0)
_STYLE_SEED = 1000
Kind = TypeVar("Kind", bound=BaseModel)


class Entry(BaseModel):
    """Frozen, and every key is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Method(Entry):
    """One way to adapt.

    Attributes:
        about: what it is, for the table.
        adapter: fields of `AdapterSpec` for both roles.
        content, style: fields that differ by role.
        training: further fields of `TrainConfig` by role, such as a range of timesteps.
        learning_rates: tried on dev.
        family: methods of one family differ in rank alone, and are one line of the plot against it.
    """

    about: str
    adapter: dict[str, Any]
    content: dict[str, Any] = {}
    style: dict[str, Any] = {}
    training: dict[Role, dict[str, Any]] = {}
    learning_rates: tuple[float, ...] = Field(min_length=1)
    family: str | None = None

    def spec(self, role: Role, rank: int, seed: int) -> AdapterSpec:
        """The adapter of a role; `rank` unless the method has its own.

        Where the start is random the two adapters of a pair start apart, as two people's would; a basis is one.
        """
        given = {"rank": rank, **self.adapter, **(self.content if role == "content" else self.style)}
        spec = AdapterSpec.model_validate(given)
        check_spec(spec)
        form = form_of(spec)
        return spec if form.frozen(spec.side) else spec.model_copy(update={"seed": role_seed(role, seed)})

    @cached_property
    def runtime(self) -> bool:
        """Whether its adapters are more than a pair, so that both are attached instead of merged."""
        return not form_of(self.spec("content", 16, 0)).low_rank


class Merge(Entry):
    """One way to merge.

    Attributes:
        about: what it is, for the table.
        method: a registered one, merging into a file or acting while a picture is drawn, or "exact": the sum of the
            updates, by `sum` on one basis and `concat` otherwise.
        options: of the method.
        normalize: both to one norm first.
        timesteps: by role, the range within which its adapter acts; both are then attached.
        on_base: whether the method learns on the base, which it is then given.
        sweep: whether other weights than (1, 1) are tried.
    """

    about: str
    method: str
    options: dict[str, Any] = {}
    normalize: bool = False
    timesteps: dict[Role, TimestepRange] = {}
    on_base: bool = False
    sweep: bool = True

    @property
    def runtime(self) -> bool:
        """Whether it is made while a picture is drawn."""
        return bool(self.timesteps) or self.method in run_time_names()

    def key(self) -> dict[str, Any]:
        """What its pictures depend on."""
        found = self.model_dump(mode="json", exclude={"about", "timesteps", "on_base", "sweep"})
        return {**found, "timesteps": self.timesteps} if self.timesteps else found

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = (EXACT, *merge_names(), *run_time_names())
        if self.method not in known:
            raise ValueError(f"no merge method {self.method!r}; known are {', '.join(known)}")
        return self


class Steps(Entry):
    """Optimiser steps of one adapter."""

    content: int = Field(gt=0)
    style: dict[int, int] = Field(min_length=1)
    """By the number of style pictures: few steps learn one picture's look, and more its content."""


class Stage(Entry):
    """How much of it.

    Attributes:
        split: "dev" or "test".
        contents, styles: how many, from the front of the split's lists.
        seeds: of training and pictures.
        draws: pictures a pair and seed, each from its own noise; averaged, as seeds are.
        shots: pictures in the style, one result each.
        steps: of training a content, and a style by its number of pictures.
        batch: pictures a step and adapter.
        rank: of adapters that have no rank of their own.
        weights: (content, style) tried besides (1, 1) to find the best and to draw the frontier.
        merge_weights: the same of ways to merge other than the sum; all of `weights` where None.
        keep: steps of the content adapter at which merges of the methods in `keep_of` are scored besides the last.
        together: adapters trained in one pass, and pictures drawn in one.
        inference_steps: of each picture; the base's own number where None.
        precision: of the denoiser's products.
    """

    split: Literal["dev", "test"]
    contents: int = Field(gt=0)
    styles: int = Field(gt=0)
    seeds: tuple[int, ...] = Field(min_length=1)
    shots: tuple[int, ...] = Field(min_length=1)
    steps: Steps
    batch: int = Field(gt=0)
    rank: int = Field(gt=0)
    weights: tuple[Weights, ...]
    merge_weights: tuple[Weights, ...] | None = None
    keep: tuple[int, ...] = ()
    keep_of: tuple[str, ...] = ()
    inference_steps: int | None = Field(default=None, gt=0)
    precision: Precision = "float32"
    together: int = Field(default=6, gt=0)
    draws: int = Field(default=1, gt=0)
    learning_rates: int | None = Field(default=None, gt=0)
    """Try this many of a method's rates, evenly spread; all where None."""

    @model_validator(mode="after")
    def _steps_for_all(self) -> Self:
        for shots in self.shots:
            if shots not in self.steps.style:
                raise ValueError(f"steps.style has no entry for {shots} style pictures")
        return self

    def rates(self, method: Method) -> tuple[float, ...]:
        """The learning rates this stage tries."""
        rates = method.learning_rates
        count = min(self.learning_rates or len(rates), len(rates))
        if count == 1:
            return (rates[len(rates) // 2],)
        return tuple(rates[round(i * (len(rates) - 1) / (count - 1))] for i in range(count))


class Plan(Entry):
    """The three files."""

    methods: dict[str, Method]
    merges: dict[str, Merge]
    stages: dict[str, Stage]

    def stage(self, name: str) -> Stage:
        """Raises QrloraError: there is none of that name."""
        return _one_of(self.stages, name, "stage")

    def method(self, name: str) -> Method:
        """Raises QrloraError: there is none of that name."""
        return _one_of(self.methods, name, "method")

    def merge(self, name: str) -> Merge:
        """Raises QrloraError: there is none of that name."""
        return _one_of(self.merges, name, "merge")


def _one_of(entries: dict[str, Kind], name: str, what: str) -> Kind:
    if name not in entries:
        raise QrloraError(f"there is no {what} {name!r}; known are {', '.join(entries)}.")
    return entries[name]


def role_seed(role: Role, seed: int) -> int:
    """Of an adapter's noise and random start: apart by role."""
    return seed if role == "content" else seed + _STYLE_SEED


def load_plan(folder: Path = HERE) -> Plan:
    """Read methods.json, merges.json and stages.json.

    Raises:
        QrloraError: a file that is missing, no JSON or not valid, with the entry's name.
    """
    parts = {name: read_json(folder / f"{name}.json") for name in ("methods", "merges", "stages")}
    plan = checked(Plan, parts, str(folder))
    for name, method in plan.methods.items():
        for role in ROLES:
            try:
                method.spec(role, 16, 0)
            except (ValidationError, QrloraError) as error:
                text = str(error).splitlines()[0]
                raise QrloraError(f"{folder / 'methods.json'}: {name} has no valid {role} adapter: {text}") from error
    return plan


def read_json(path: Path) -> Any:
    """Raises QrloraError: not there, or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QrloraError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise QrloraError(f"{path} is not JSON: {error}.") from error


def checked(kind: type[Kind], values: Any, source: str) -> Kind:
    """Raises QrloraError: the first thing that is not valid, by its place."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise QrloraError(f"{source}: {place}: {problem['msg']}.") from error
