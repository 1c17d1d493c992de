"""Noise processes against diffusers' own schedulers and the formulas of the papers."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from qrlora.models import Diffusion, FlowMatching
from qrlora.models._noise import Prediction

CLEAN = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
INDEX = torch.tensor([0, 400, 999])


def test_flow_matching_is_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = FlowMatching(scheduler.sigmas)
    torch.testing.assert_close(process.timesteps, scheduler.timesteps)
    expected = scheduler.scale_noise(CLEAN, scheduler.timesteps[INDEX], NOISE)
    torch.testing.assert_close(process.noisy(CLEAN, NOISE, INDEX), expected)
    torch.testing.assert_close(process.target(CLEAN, NOISE, INDEX), NOISE - CLEAN, rtol=0, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusion_is_the_schedulers(prediction: Prediction) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    process = Diffusion(scheduler.alphas_cumprod, prediction)
    timesteps = process.levels[INDEX].long()
    assert timesteps.tolist() == [999, 599, 0]
    torch.testing.assert_close(process.noisy(CLEAN, NOISE, INDEX), scheduler.add_noise(CLEAN, NOISE, timesteps))
    expected = NOISE if prediction == "epsilon" else scheduler.get_velocity(CLEAN, NOISE, timesteps)
    torch.testing.assert_close(process.target(CLEAN, NOISE, INDEX), expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_picture_by_no_more_than_gamma(prediction: Prediction) -> None:
    """Whatever is predicted, an error d of the implied clean picture costs min(SNR, gamma) d^2."""
    alphas = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double()
    process = Diffusion(alphas, prediction)
    index = torch.arange(1000)
    alpha = alphas.flip(0)
    # x_0 = (x_t - sqrt(1 - a) e) / sqrt(a) = sqrt(a) x_t - sqrt(1 - a) v
    error_of_picture = ((1 - alpha) / alpha) if prediction == "epsilon" else (1 - alpha)
    expected = (alpha / (1 - alpha)).clamp(max=5.0) * error_of_picture
    torch.testing.assert_close(process.min_snr_weights(index, 5.0).double(), expected, rtol=1e-4, atol=1e-6)
