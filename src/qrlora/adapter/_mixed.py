"""What many adapters add to one component, each picture of a batch its own sum of them.

On peft's layers an adapter is two modules a layer, with a basis of its own; making some active walks through the
modules of all, and a mixed batch takes one adapter a picture, at the weight last set, in a pass of its own. Here a
layer has what its adapters share (a basis `Q`) once, and of each adapter the coefficients alone. Picture `b` gets

    y_b = W x_b + Q (sum_i w_bi dR_i) x_b

by one batched product for the sums and one product with `Q` for all pictures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qrlora.adapter._weights import path_stem
from qrlora.errors import QrloraError
from qrlora.formats import Adapter, LowRank

Row = Mapping[str, float]
"""The adapters of one picture with their weights; empty for the base alone."""
_INPUTS = ("hidden_states", "sample", "x", "input_ids")
"""What a component's batch is called where it is given by name."""


@dataclass
class Plan:
    """What rows ask of the groups that have the same adapters; rows alike are summed up once."""

    names: list[str]
    weights: Tensor
    """`[U, K]`: of each different combination the weights of the `names`."""
    of_row: list[int | None]
    """Which combination a row has; None where it has none of the adapters."""
    only: float | None
    """The weight, where there is one adapter at one weight."""
    places: dict[int, tuple[Tensor | None, Tensor | None]] = field(
        default_factory=dict[int, tuple[Tensor | None, Tensor | None]]
    )

    def at(self, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """For a batch in which the rows come over and over: the items with any of the adapters (None: all), and the
        combination of each (None: the first for all)."""
        if batch not in self.places:
            which = [self.of_row[item % len(self.of_row)] for item in range(batch)]
            items = [item for item, combination in enumerate(which) if combination is not None]
            device, one = self.weights.device, len(self.weights) == 1
            self.places[batch] = (
                None if len(items) == batch else torch.tensor(items, device=device),
                None if one else torch.tensor([which[item] for item in items], device=device),
            )
        return self.places[batch]


def planned(rows: Sequence[Row], names: tuple[str, ...], device: torch.device) -> Plan:
    """The plan of groups that have these of the rows' adapters, and no others of them."""
    combinations: dict[tuple[float, ...], int] = {}
    of_row: list[int | None] = []
    for row in rows:
        own = tuple(row.get(name, 0.0) for name in names)
        of_row.append(combinations.setdefault(own, len(combinations)) if any(own) else None)
    weights = torch.tensor(list(combinations), dtype=torch.float32, device=device)
    only = next(iter(combinations))[0] if weights.numel() == 1 else None
    return Plan(list(names), weights, of_row, only)


@dataclass
class Group:
    """Adapters of one layer with one factor in common."""

    shared: Tensor
    """lora_B `[m, r]` where `output`, else lora_A `[r, n]`, in the dtype that computes."""
    output: bool
    own: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The other factor by adapter, fp32."""
    plan: Plan | None = None
    sums: Tensor | None = None
    """`[U, r, n]` or `[U, m, r]`: of each combination of the plan the sum of what its adapters have of their own."""

    def choose(self, plan: Plan | None) -> None:
        """Sum up for the rows of a plan, or for none."""
        self.plan, self.sums = plan, None
        if plan is None:
            return
        own = [self.own[name] for name in plan.names]
        if plan.only is not None:
            self.sums = own[0].mul(plan.only).unsqueeze(0).to(self.shared.dtype)
        else:
            self.sums = torch.einsum("uk,kij->uij", plan.weights, torch.stack(own)).to(self.shared.dtype)

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """`output` with what the rows chosen add."""
        assert self.plan is not None
        assert self.sums is not None
        items, which = self.plan.at(len(x))
        part = (x if items is None else x.index_select(0, items)).to(self.shared.dtype)
        added = self._update(part, self.sums, which).to(output.dtype)
        return output + added if items is None else output.index_add(0, items, added)

    def _update(self, x: Tensor, sums: Tensor, which: Tensor | None) -> Tensor:
        if which is None:
            B, A = (self.shared, sums[0]) if self.output else (sums[0], self.shared)
            return F.linear(F.linear(x, A), B)
        each, flat = sums.index_select(0, which), x.reshape(len(x), -1, x.shape[-1])
        if self.output:
            added = F.linear(torch.bmm(flat, each.mT), self.shared)
        else:
            added = torch.bmm(F.linear(flat, self.shared), each.mT)
        return added.reshape(*x.shape[:-1], -1)


@dataclass
class MixedLayer:
    """One layer, its adapters grouped by what they share."""

    name: str
    part: "MixedComponent"
    place: tuple[nn.Module, str]
    """The module that has the layer, and its name there."""
    group_of: dict[str, Group] = field(default_factory=dict[str, Group])
    """By adapter."""
    alike: dict[Any, list[Group]] = field(default_factory=dict[Any, list[Group]])
    """By something that tells most shared factors apart."""
    hooked: nn.Module | None = None
    handle: RemovableHandle | None = None

    def follow(self) -> None:
        """Add to what stands in the layer's place now: peft may have wrapped it, and some forms compute with what is
        inside."""
        parent, name = self.place
        module = getattr(parent, name)
        if module is not self.hooked:
            self.detach()
            self.hooked, self.handle = module, module.register_forward_hook(self.hook)

    def detach(self) -> None:
        """Add to nothing any more."""
        if self.handle is not None:
            self.handle.remove()

    def groups(self, names: Iterable[str]) -> list[Group]:
        """Those that have any of the adapters."""
        found = {id(group): group for name in names if (group := self.group_of.get(name)) is not None}
        return list(found.values())

    def add(self, adapter_name: str, pair: LowRank, *, output: bool) -> None:
        """Keep the pair, its shared factor once."""
        shared, own = (pair.B, pair.A) if output else (pair.A, pair.B)
        first = (float(value) for value in shared.flatten()[:4])
        shared = shared.to(self.part.device, self.part.dtype)
        alike = self.alike.setdefault((output, *shared.shape, *first), [])
        group = next((group for group in alike if torch.equal(group.shared, shared)), None)
        if group is None:
            group = Group(shared, output)
            alike.append(group)
        group.own[adapter_name] = own.to(self.part.device, torch.float32, copy=True)
        self.group_of[adapter_name] = group

    def remove(self, adapter_name: str) -> None:
        """Let an adapter go, and what nobody shares any more."""
        group = self.group_of.pop(adapter_name, None)
        if group is not None:
            del group.own[adapter_name]
        self.alike = {key: kept for key, groups in self.alike.items() if (kept := [g for g in groups if g.own])}

    def hook(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the layer: its own output, and what the rows add."""
        for group in self.part.acting.get(self.name, ()):
            if self.part.rows > 1 and len(inputs[0]) != self.part.batch:
                raise QrloraError(
                    f"{self.name} is given {len(inputs[0])} items where the batch has {self.part.batch}, so which "
                    "picture has which adapters cannot be told; choose one row for all."
                )
            output = group.add_to(output, inputs[0])
        return output


@dataclass
class MixedComponent:
    """One component of the pipeline."""

    module: nn.Module
    device: torch.device
    dtype: torch.dtype
    layers: dict[str, MixedLayer] = field(default_factory=dict[str, MixedLayer])
    acting: dict[str, list[Group]] = field(default_factory=dict[str, list[Group]])
    rows: int = 1
    batch: int = 0
    handle: RemovableHandle | None = None

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the component runs: where its layers are, and how many items there are."""
        for path in self.acting:
            self.layers[path].follow()
        given = next((kwargs[name] for name in _INPUTS if name in kwargs), None) if not args else args[0]
        if self.rows == 1 or not self.acting:
            return
        self.batch = 0 if given is None else len(given)
        if self.batch == 0 or self.batch % self.rows:
            raise QrloraError(
                f"the batch has {self.batch} items and adapters are chosen for {self.rows}; choose one row for each "
                "picture (guidance may double the batch), or one for all."
            )

    def take(self, name: str, adapter: Adapter) -> None:
        """Keep an adapter's layers, and look after these from now on."""
        if self.handle is None:
            self.handle = self.module.register_forward_pre_hook(self.before, with_kwargs=True)
        stem = path_stem(self.module)
        output = adapter.header is None or adapter.header.side != "input"
        for path, pair in adapter.layers.items():
            if path not in self.layers:
                parent, _, leaf = path.removeprefix(stem).rpartition(".")
                self.layers[path] = MixedLayer(path, self, (self.module.get_submodule(parent), leaf))
            self.layers[path].add(name, pair, output=output)

    def choose(self, rows: Sequence[Row]) -> None:
        """Sum up for these rows in every layer."""
        for groups in self.acting.values():
            for group in groups:
                group.choose(None)
        self.rows, self.acting = max(len(rows), 1), {}
        used = dict.fromkeys(name for row in rows for name, weight in row.items() if weight != 0)
        plans: dict[tuple[str, ...], Plan] = {}  # most layers have the same adapters
        for path, layer in self.layers.items():
            for group in layer.groups(used):
                names = tuple(name for name in used if name in group.own)
                if names not in plans:
                    plans[names] = planned(rows, names, self.device)
                group.choose(plans[names])
                self.acting.setdefault(path, []).append(group)

    def detach(self) -> None:
        """Leave the component as it was."""
        for layer in self.layers.values():
            layer.detach()
        if self.handle is not None:
            self.handle.remove()
