"""How pictures are noised while training and what the denoiser is asked for there: pure tensor mathematics.

Levels run from the noisiest to the cleanest, as a picture is made, and a batch names its levels by their index `[N]`.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from qrlora.errors import QrloraError

Prediction = Literal["epsilon", "v_prediction"]


class NoiseProcess(ABC):
    """A table of noise levels, and what it means to be at one of them.

    Attributes:
        levels: `[T]` fp32 on the CPU, what `Family.predict` takes: sigmas, or timesteps.
        timesteps: `[T]`, the same levels as schedulers count them, up to 1000 for pure noise.
    """

    levels: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.levels)

    @abstractmethod
    def noisy(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """Latents `[N, C, h, w]` at levels `index` `[N]`."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """What the denoiser is to predict there, `[N, C, h, w]`."""

    @abstractmethod
    def min_snr_weights(self, index: Tensor, gamma: float) -> Tensor:
        """Loss weights `[N]` by level, min(SNR, gamma) over what the target already weighs (arXiv 2303.09556)."""


class FlowMatching(NoiseProcess):
    """Rectified flow (arXiv 2403.03206): `x_s = (1 - s) x_0 + s e`, target velocity `e - x_0`."""

    def __init__(self, sigmas: Tensor) -> None:
        """Args:
        sigmas: `[T]` in (0, 1], largest first.
        """
        self.levels = sigmas.float()
        self.timesteps = self.levels * 1000

    def noisy(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        return torch.lerp(clean, noise, _column(self.levels, index, clean))

    def target(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        return noise - clean

    def min_snr_weights(self, index: Tensor, gamma: float) -> Tensor:
        raise QrloraError(
            f"snr_gamma={gamma} is for models that predict noise or v (SDXL); this one is trained by flow matching; "
            "use weighting_scheme instead."
        )


class Diffusion(NoiseProcess):
    """Variance preserving: `x_t = sqrt(a) x_0 + sqrt(1 - a) e`, target `e`, or `v = sqrt(a) e - sqrt(1 - a) x_0`.

    Sources: DDPM (arXiv 2006.11239, equation 4), v-prediction (arXiv 2202.00512, appendix D).
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: Prediction) -> None:
        """Args:
        alphas_cumprod: `[T]`, a_t from t = 0, the cleanest.
        prediction: what the denoiser was trained to predict.
        """
        self._alphas = alphas_cumprod.float().flip(0)
        self._prediction = prediction
        self.levels = torch.arange(len(alphas_cumprod) - 1, -1, -1).float()
        self.timesteps = self.levels * (1000 / len(alphas_cumprod))

    def noisy(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        alpha = _column(self._alphas, index, clean)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        if self._prediction == "epsilon":
            return noise
        alpha = _column(self._alphas, index, clean)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

    def min_snr_weights(self, index: Tensor, gamma: float) -> Tensor:
        alpha = self._alphas.to(index.device)[index]
        snr = alpha / (1 - alpha)
        if self._prediction == "epsilon":
            return (gamma / snr).clamp(max=1)  # as it is written, 0 / 0 where a schedule ends in pure noise
        return snr.clamp(max=gamma) / (snr + 1)


def _column(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return table.to(like.device)[index.to(like.device)][:, None, None, None]
