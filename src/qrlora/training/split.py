"""How the pictures of a step are shared out, which does not change what is drawn.

A step's pictures, noise and noise levels are drawn as `batches` batches of `batch`, as one process alone would draw
them. Processes and accumulation take them in that order, `size` at a time. So a run is the same run, to the order of
its sums, on any number of processes, and may be continued on another number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qrlora.data import Encoded
from qrlora.errors import QrloraError
from qrlora.models import NoiseProcess
from qrlora.training.config import TrainConfig
from qrlora.training.objective import Draw, draw


@dataclass(frozen=True)
class Split:
    """The share of one process.

    Attributes:
        config: with `train_batch_size` and `gradient_accumulation_steps` as they are drawn.
        size: pictures that this process takes at a time.
        process: of this process among `processes`.
    """

    config: TrainConfig
    size: int
    process: int
    processes: int

    @property
    def micros(self) -> int:
        """How often each process takes pictures in a step."""
        drawn = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return drawn // (self.size * self.processes)

    def parts(self, micro: int) -> list[tuple[int, slice]]:
        """The drawn batches that this process's accumulation index `micro` takes from, and which of their items."""
        batch = self.config.train_batch_size
        first = (micro * self.processes + self.process) * self.size
        last = first + self.size
        touched = range(first // batch, (last - 1) // batch + 1)
        return [(i, slice(max(first - i * batch, 0), min(last - i * batch, batch))) for i in touched]

    def draw(self, encoded: Encoded, process: NoiseProcess, step: int, micro: int, *, of_class: bool = False) -> Draw:
        """What this process computes at its accumulation index `micro`; see `objective.draw`."""
        return _joined(
            [
                draw(self.config, encoded, process, step, index, of_class=of_class).part(items)
                for index, items in self.parts(micro)
            ]
        )

    def check(self, sizes: int) -> None:
        """Refuse to lay batches together that may be of pictures of several sizes.

        Raises:
            QrloraError: as said.
        """
        if sizes > 1 and any(len(self.parts(micro)) > 1 for micro in range(self.micros)):
            raise QrloraError(
                f"train_batch_size={self.size} would lay batches of {self.config.train_batch_size} together, of which "
                "the run is made, and with aspect_ratio_buckets these may be of several sizes; continue it with "
                f"train_batch_size: {self.config.train_batch_size} or a divisor of it, and more "
                "gradient_accumulation_steps."
            )


def split_of(config: TrainConfig, process: int, processes: int, then: Mapping[str, Any] | None = None) -> Split:
    """The share of a process.

    Args:
        config: as given: its `train_batch_size` is a process's.
        process: of this process among `processes`.
        processes: how many there are.
        then: the record of the run that is continued, drawn as it was begun, of as many pictures a step.
    """
    batch, batches = config.train_batch_size * processes, config.gradient_accumulation_steps
    if then is not None:
        batch, batches = int(then["train_batch_size"]), int(then["gradient_accumulation_steps"])
    drawn = config.model_copy(update={"train_batch_size": batch, "gradient_accumulation_steps": batches})
    return Split(drawn, config.train_batch_size, process, processes)


def as_drawn(split: Split) -> dict[str, int]:
    """What a record says of how a step's pictures are drawn."""
    names = ("train_batch_size", "gradient_accumulation_steps")
    return {name: getattr(split.config, name) for name in names}


def _joined(draws: Sequence[Draw]) -> Draw:
    """Batches of one group of pictures as one."""
    if len(draws) == 1:
        return draws[0]
    weights = [each.weighting for each in draws if each.weighting is not None]
    return Draw(
        group=draws[0].group,
        rows=torch.cat([each.rows for each in draws]),
        captions=torch.cat([each.captions for each in draws]),
        index=torch.cat([each.index for each in draws]),
        noise=torch.cat([each.noise for each in draws]),
        weighting=torch.cat(weights) if weights else None,
    )
