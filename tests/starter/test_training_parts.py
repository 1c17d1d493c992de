"""What the training of the embedded base rests on: its draws, its captions, its latents, and its checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("resvg_py")

from tools.starter.captions import TRIGGERS, caption, dropped
from tools.starter.pictures import PLAIN, mixed
from tools.starter.run import Run, batches, cosine, generator


def test_an_epoch_shows_every_item_once() -> None:
    seen = torch.cat([batches(12, 4, seed=3, step=step) for step in (1, 2, 3)])
    assert sorted(seen.tolist()) == list(range(12))
    assert not torch.equal(seen, torch.cat([batches(12, 4, seed=3, step=step) for step in (4, 5, 6)]))


def test_a_mixed_batch_has_the_wished_share_of_treated_pictures() -> None:
    import numpy as np

    treatment = np.array([PLAIN] * 10 + [0] * 10 + [1] * 10)
    index = mixed(treatment, size=8, treated=3, seed=0, step=5)
    assert (treatment[index] == PLAIN).sum() == 5


def test_the_schedule_rises_then_falls_to_zero() -> None:
    values = [cosine(step, 100, 10) for step in range(101)]
    assert values[9] == 1
    assert values[100] == pytest.approx(0, abs=1e-12)
    assert values[55] == pytest.approx(0.5)


def test_captions_keep_their_parts_or_lose_them_whole() -> None:
    random = generator(0, 1)
    made = {dropped("red apple", "noto", "as pixel art", random) for _ in range(400)}
    assert caption("red apple", "noto", "as pixel art") in made
    assert "" in made
    assert "a red apple emoji" in made
    assert "an emoji in noto style as pixel art" in made
    assert any(trigger in text for trigger in TRIGGERS for text in made)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def run(folder: Path, steps: int) -> nn.Linear:
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        part = Run(folder, module, 6, learning_rate=0.1, warmup=1, save_every=1)

        def loss(step: int) -> torch.Tensor:
            if step > steps:
                raise KeyboardInterrupt
            return module(torch.randn(4, 3, generator=generator(1, step))).square().mean()

        part.go(loss)
        return module

    whole = run(tmp_path / "whole", 6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 3)
    resumed = run(tmp_path / "cut", 6)
    assert torch.equal(whole.weight, resumed.weight)
