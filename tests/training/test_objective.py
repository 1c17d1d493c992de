"""Draws and losses against formulas written out in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.data import Encoded
from qrlora.models import LoadedModel
from qrlora.training import TrainConfig
from qrlora.training.objective import draw, flow_loss, loss_of, picture_rows, stream
from qrlora.training.optimiser import learning_rates

TABLE = torch.arange(1000, 0, -1) / 1000


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig.parse({"instance_data_dir": "x", "output_dir": "y", "train_batch_size": 4} | changes)


def _encoded(count: int = 3, flips: bool = False) -> Encoded:
    generator = torch.Generator().manual_seed(1)
    rows = 2 * count if flips else count
    return Encoded(
        latents=torch.randn(rows, 4, 4, 4, generator=generator),
        weights=None,
        conditioning={
            "prompt_embeds": torch.randn(2, 16, 32, generator=generator),
            "pooled_prompt_embeds": torch.randn(2, 32, generator=generator),
        },
        caption_rows=torch.arange(count) % 2,
        count=count,
        fingerprint="",
    )


def test_a_draw_is_a_function_of_seed_step_and_process() -> None:
    encoded = _encoded()
    reference = draw(_config(), encoded, TABLE, 7, 1, process=1, processes=2)
    torch.manual_seed(123)
    again = draw(_config(), encoded, TABLE, 7, 1, process=1, processes=2)
    for name in ("rows", "captions", "sigmas", "noise"):
        torch.testing.assert_close(getattr(reference, name), getattr(again, name), rtol=0, atol=0)
    others = [
        draw(_config(seed=1), encoded, TABLE, 7, 1, process=1, processes=2),
        draw(_config(), encoded, TABLE, 8, 1, process=1, processes=2),
        draw(_config(), encoded, TABLE, 7, 0, process=1, processes=2),
        draw(_config(), encoded, TABLE, 7, 1, process=0, processes=2),
    ]
    assert all(not torch.equal(other.noise, reference.noise) for other in others)
    assert len({float(other.noise[0, 0, 0, 0]) for other in others}) == 4


def test_every_item_draws_for_itself() -> None:
    drawn = draw(_config(train_batch_size=16), _encoded(1), TABLE, 0, 0)
    assert len(set(drawn.sigmas.tolist())) > 10
    assert len({float(noise.sum()) for noise in drawn.noise}) == 16
    assert drawn.rows.tolist() == [0] * 16


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 100))
def test_every_picture_is_seen_equally_often(count: int, batch: int, accumulation: int, world: int, seed: int) -> None:
    config = _config(train_batch_size=batch, gradient_accumulation_steps=accumulation, seed=seed)
    seen = [
        row
        for step in range(count)
        for micro in range(accumulation)
        for process in range(world)
        for row in picture_rows(config, count, step, micro, process, world)
    ]
    assert np.bincount(seen, minlength=count).tolist() == [batch * accumulation * world] * count


def test_uniform_levels_by_default_and_the_other_schemes() -> None:
    encoded = _encoded()
    uniform = draw(_config(train_batch_size=4000), encoded, TABLE, 0, 0)
    histogram = torch.histc(uniform.sigmas, 4, 0, 1) / 4000
    torch.testing.assert_close(histogram, torch.full((4,), 0.25), rtol=0, atol=0.03)
    assert uniform.weighting is None
    normal = draw(_config(train_batch_size=4000, weighting_scheme="logit_normal"), encoded, TABLE, 0, 0).sigmas
    assert float(normal.std()) < 0.23 < float(uniform.sigmas.std())
    middle = draw(_config(train_batch_size=4000, weighting_scheme="mode"), encoded, TABLE, 0, 0).sigmas
    assert float((middle - 0.5).abs().mean()) < 0.22
    root = draw(_config(weighting_scheme="sigma_sqrt"), encoded, TABLE, 0, 0)
    torch.testing.assert_close(root.weighting, root.sigmas**-2.0)
    cosmap = draw(_config(weighting_scheme="cosmap"), encoded, TABLE, 0, 0)
    torch.testing.assert_close(cosmap.weighting, 2 / (torch.pi * (1 - 2 * cosmap.sigmas + 2 * cosmap.sigmas**2)))


def test_flips_are_drawn_only_where_they_are_cached() -> None:
    rows = draw(_config(train_batch_size=64), _encoded(3, flips=True), TABLE, 0, 0).rows
    assert 10 < int((rows >= 3).sum()) < 54
    assert draw(_config(train_batch_size=64), _encoded(3), TABLE, 0, 0).rows.max() == 2


def test_the_loss_is_the_formula(model: LoadedModel) -> None:
    encoded = _encoded()
    weights = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    encoded = Encoded(**{**encoded.__dict__, "weights": weights / weights.mean(dim=(1, 2, 3), keepdim=True)})
    drawn = draw(_config(weighting_scheme="cosmap"), encoded, TABLE, 0, 0)
    with torch.no_grad():
        loss = loss_of(model.family, model.denoiser, encoded, drawn, 1.0)
        total = torch.zeros((), dtype=torch.float64)
        for item in range(4):
            row, sigma = int(drawn.rows[item]), drawn.sigmas[item].double()
            clean, noise = encoded.latents[row].double(), drawn.noise[item].double()
            caption = int(encoded.caption_rows[row])
            velocity = model.family.predict(
                model.denoiser,
                ((1 - sigma) * clean + sigma * noise).float()[None],
                sigma.float()[None],
                {key: value[caption][None] for key, value in encoded.conditioning.items()},
                1.0,
            )[0].double()
            mask = weights[row].double().expand(4, 4, 4)
            error = (mask * (velocity - (noise - clean)) ** 2).sum() / mask.sum()
            total += error * 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))
    assert float(loss) == pytest.approx(float(total) / 4, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16), st.floats(0.01, 4))
def test_the_scale_of_the_loss_does_not_depend_on_the_masks_area(cells: int, error: float) -> None:
    mask = torch.zeros(16)
    mask[:cells] = 1
    weights = (mask / mask.mean()).reshape(1, 1, 4, 4)
    outside = torch.where(mask.reshape(1, 1, 4, 4) > 0, error, 1e3).expand(1, 8, 4, 4)
    assert float(flow_loss(outside, torch.zeros(1, 8, 4, 4), weights, None)) == pytest.approx(error**2, rel=1e-4)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_learning_rates_are_diffusers_schedules(name: str) -> None:
    config = _config(lr_scheduler=name, lr_warmup_steps=3, max_train_steps=12, learning_rate=0.2)
    rates = learning_rates(config)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = get_scheduler(name, optimiser, num_warmup_steps=3, num_training_steps=12)
    for step in range(12):
        assert rates(step) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-5)
        optimiser.step()
        schedule.step()


def test_streams_differ() -> None:
    keys = [(0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (2**62, 1)]
    assert len({stream(*key) for key in keys}) == len(keys)
