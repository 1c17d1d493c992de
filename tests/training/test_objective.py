"""Draws and losses against formulas written out in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora.data import Encoded, Group
from qrlora.errors import QrloraError
from qrlora.models import Diffusion, FlowMatching, LoadedModel
from qrlora.training import TrainConfig
from qrlora.training.objective import check_levels, draw, loss_of, weighted_loss
from qrlora.training.optimiser import learning_rates

PROCESS = FlowMatching(torch.arange(1000, 0, -1) / 1000)
SIGMAS = PROCESS.levels


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig.parse({"instance_data_dir": "x", "output_dir": "y", "train_batch_size": 4} | changes)


def _encoded(count: int = 3, flips: bool = False) -> Encoded:
    generator = torch.Generator().manual_seed(1)
    rows = 2 * count if flips else count
    return Encoded(
        groups=(Group(torch.randn(rows, 4, 4, 4, generator=generator), None, torch.arange(count) % 2),),
        conditioning={
            "prompt_embeds": torch.randn(2, 16, 32, generator=generator),
            "pooled_prompt_embeds": torch.randn(2, 32, generator=generator),
        },
        fingerprint="",
        mirrored=flips,
    )


def test_a_draw_is_a_function_of_seed_step_and_batch() -> None:
    encoded = _encoded()
    reference = draw(_config(), encoded, PROCESS, 7, 1)
    torch.manual_seed(123)
    again = draw(_config(), encoded, PROCESS, 7, 1)
    for name in ("rows", "captions", "index", "noise"):
        torch.testing.assert_close(getattr(reference, name), getattr(again, name), rtol=0, atol=0)
    others = [
        draw(_config(seed=1), encoded, PROCESS, 7, 1),
        draw(_config(), encoded, PROCESS, 8, 1),
        draw(_config(), encoded, PROCESS, 7, 0),
    ]
    assert all(not torch.equal(other.noise, reference.noise) for other in others)
    assert len({float(other.noise[0, 0, 0, 0]) for other in others}) == 3


def test_every_item_draws_for_itself() -> None:
    drawn = draw(_config(train_batch_size=16), _encoded(1), PROCESS, 0, 0)
    assert len(set(drawn.index.tolist())) > 10
    assert len({float(noise.sum()) for noise in drawn.noise}) == 16
    assert drawn.rows.tolist() == [0] * 16


def test_uniform_levels_by_default_and_the_other_schemes() -> None:
    encoded = _encoded()
    uniform = draw(_config(train_batch_size=4000), encoded, PROCESS, 0, 0)
    histogram = torch.histc(SIGMAS[uniform.index], 4, 0, 1) / 4000
    torch.testing.assert_close(histogram, torch.full((4,), 0.25), rtol=0, atol=0.03)
    assert uniform.weighting is None
    normal = draw(_config(train_batch_size=4000, weighting_scheme="logit_normal"), encoded, PROCESS, 0, 0)
    assert float(SIGMAS[normal.index].std()) < 0.23 < float(SIGMAS[uniform.index].std())
    middle = draw(_config(train_batch_size=4000, weighting_scheme="mode"), encoded, PROCESS, 0, 0)
    assert float((SIGMAS[middle.index] - 0.5).abs().mean()) < 0.22
    root = draw(_config(weighting_scheme="sigma_sqrt"), encoded, PROCESS, 0, 0)
    torch.testing.assert_close(root.weighting, SIGMAS[root.index] ** -2.0)
    cosmap = draw(_config(weighting_scheme="cosmap"), encoded, PROCESS, 0, 0)
    sigmas = SIGMAS[cosmap.index]
    torch.testing.assert_close(cosmap.weighting, 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas**2)))


def test_levels_stay_within_the_range() -> None:
    config = _config(train_batch_size=4000, min_timestep=250, max_timestep=500)
    drawn = SIGMAS[draw(config, _encoded(), PROCESS, 0, 0).index]
    assert (float(drawn.min()), float(drawn.max())) == (0.25, 0.5)
    torch.testing.assert_close(torch.histc(drawn, 4) / 4000, torch.full((4,), 0.25), rtol=0, atol=0.03)
    few = FlowMatching(torch.tensor([1.0, 0.5]))
    with pytest.raises(QrloraError, match="no noise level of this model has a timestep from min_timestep=600"):
        check_levels(_config(min_timestep=600, max_timestep=900), few)
    with pytest.raises(QrloraError, match=r"min_timestep=600.0 must be below max_timestep=500"):
        _config(min_timestep=600, max_timestep=500)


def test_weightings_are_refused_where_they_mean_nothing() -> None:
    diffusion = Diffusion(torch.linspace(0.99, 0.01, 10), "epsilon")
    with pytest.raises(QrloraError, match="weighting_scheme=cosmap is for models trained by flow matching"):
        check_levels(_config(weighting_scheme="cosmap"), diffusion)
    with pytest.raises(QrloraError, match=r"snr_gamma=5.0 is for models that predict noise or v"):
        check_levels(_config(snr_gamma=5.0), PROCESS)
    with pytest.raises(QrloraError, match="both weight the loss"):
        _config(snr_gamma=5.0, weighting_scheme="cosmap")


def test_flips_are_drawn_only_where_they_are_cached() -> None:
    rows = draw(_config(train_batch_size=64), _encoded(3, flips=True), PROCESS, 0, 0).rows
    assert 10 < int((rows >= 3).sum()) < 54
    assert draw(_config(train_batch_size=64), _encoded(3), PROCESS, 0, 0).rows.max() == 2


def test_the_loss_is_the_formula(model: LoadedModel) -> None:
    encoded = _encoded()
    weights = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    group = replace(encoded.groups[0], weights=weights / weights.mean(dim=(1, 2, 3), keepdim=True))
    encoded = replace(encoded, groups=(group,))
    drawn = draw(_config(weighting_scheme="cosmap"), encoded, PROCESS, 0, 0)
    with torch.no_grad():
        loss = loss_of(model.family, model.denoiser, encoded, drawn, PROCESS, 1.0)
        total = torch.zeros((), dtype=torch.float64)
        for item in range(4):
            row, sigma = int(drawn.rows[item]), SIGMAS[drawn.index[item]].double()
            clean, noise = group.latents[row].double(), drawn.noise[item].double()
            caption = int(group.caption_rows[row])
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
    assert float(weighted_loss(outside, torch.zeros(1, 8, 4, 4), weights, None)) == pytest.approx(error**2, rel=1e-4)


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
