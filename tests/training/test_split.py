"""What a step draws does not depend on how it is shared out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.data import Encoded, Group
from qrlora.errors import QrloraError
from qrlora.models import FlowMatching
from qrlora.training import TrainConfig
from qrlora.training.objective import Draw, draw
from qrlora.training.record import check_same_run, record_of
from qrlora.training.split import as_drawn, split_of

PROCESS = FlowMatching(torch.arange(1000, 0, -1) / 1000)
PARTS = ("rows", "captions", "index", "noise", "weighting")


def _config(**changes: Any) -> TrainConfig:
    given = {"instance_data_dir": "x", "output_dir": "y", "weighting_scheme": "sigma_sqrt", "seed": 3}
    return TrainConfig.parse(given | changes)


def _encoded(*sizes: int) -> Encoded:
    generator = torch.Generator().manual_seed(1)
    groups = [
        Group(torch.randn(5, 4, 2 + 2 * i, 4, generator=generator), None, torch.arange(5) % 2)
        for i in range(*sizes or (1,))
    ]
    return Encoded(groups=tuple(groups), conditioning={"prompt_embeds": torch.zeros(2, 1, 1)}, fingerprint="")


def _step(config: TrainConfig, processes: int, encoded: Encoded, then: Any = None) -> list[Draw]:
    """All that a step draws, in the order in which the processes take it."""
    splits = [split_of(config, process, processes, then) for process in range(processes)]
    micros = range(config.gradient_accumulation_steps)
    assert all(split.micros == len(micros) for split in splits)
    return [split.draw(encoded, PROCESS, 7, micro) for micro in micros for split in splits]


def _laid_out(draws: list[Draw]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([getattr(each, name) for each in draws]) for name in PARTS}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_processes_draw_what_one_draws(batch: int, accumulation: int, processes: int) -> None:
    encoded = _encoded()
    shared = _config(train_batch_size=batch, gradient_accumulation_steps=accumulation)
    alone = _config(train_batch_size=batch * processes, gradient_accumulation_steps=accumulation)
    one = _laid_out([draw(alone, encoded, PROCESS, 7, micro) for micro in range(accumulation)])
    several = _laid_out(_step(shared, processes, encoded))
    assert all(torch.equal(one[name], several[name]) for name in PARTS)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(b, a, p) for b in (1, 2, 3, 6, 12) for a in (1, 2, 4, 12) for p in (1, 2, 3) if b * a * p == 12])
)
def test_a_run_goes_on_with_its_own_draws_however_it_is_cut(cut: tuple[int, int, int]) -> None:
    encoded, (batch, accumulation, processes) = _encoded(), cut
    begun = split_of(_config(train_batch_size=2, gradient_accumulation_steps=3), 0, 2)
    then = as_drawn(begun)
    assert then == {"train_batch_size": 4, "gradient_accumulation_steps": 3}
    wanted = _laid_out([draw(begun.config, encoded, PROCESS, 7, micro) for micro in range(3)])
    now = _config(train_batch_size=batch, gradient_accumulation_steps=accumulation)
    found = _laid_out(_step(now, processes, encoded, then))
    assert all(torch.equal(wanted[name], found[name]) for name in PARTS)


def test_batches_of_several_sizes_are_not_laid_together() -> None:
    then = {"train_batch_size": 2, "gradient_accumulation_steps": 4}
    split_of(_config(train_batch_size=1, gradient_accumulation_steps=4), 0, 2, then).check(2)
    joining = split_of(_config(train_batch_size=4, gradient_accumulation_steps=1), 0, 2, then)
    joining.check(1)
    with pytest.raises(QrloraError, match="train_batch_size=4 would lay batches of 2 together"):
        joining.check(2)
    odd = split_of(_config(train_batch_size=3, gradient_accumulation_steps=2), 0, 2, then | {"train_batch_size": 3})
    odd.check(2)


def test_the_pictures_of_a_step_decide_whether_a_run_is_the_same() -> None:
    def record(batch: int, accumulation: int, processes: int) -> dict[str, Any]:
        config = _config(train_batch_size=batch, gradient_accumulation_steps=accumulation)
        return record_of(split_of(config, 0, processes).config, data="d", base="b")

    check_same_run(record(1, 2, 2), record(4, 1, 1), "there")
    check_same_run(record(1, 2, 2), {**record(2, 2, 1), "processes": 1}, "there")
    never_clipped = {**record(4, 1, 1), "max_grad_norm": "inf"}
    for older in (None, float("inf")):  # a header's JSON, and a checkpoint's
        check_same_run(never_clipped, {**never_clipped, "max_grad_norm": older}, "there")
    with pytest.raises(QrloraError, match=r"the pictures of a step, differ from that run \(4 then, 6 now\)"):
        check_same_run(record(3, 2, 1), record(2, 1, 2), "there")
    with pytest.raises(QrloraError, match="begun on several processes by an older version"):
        check_same_run(record(1, 2, 2), {**record(4, 1, 1), "processes": 2}, "there")
