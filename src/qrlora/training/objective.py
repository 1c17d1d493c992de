"""What is drawn and what is minimised at one step: flow matching on cached latents.

`x_s = (1 - s) x_0 + s e`, target velocity `e - x_0` (rectified flow, arXiv 2403.03206). Every draw is a function of
(seed, step, accumulation index, process), so a run continued from step k sees what the uninterrupted run sees.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor, nn

from qrlora.data import Encoded
from qrlora.models import Family
from qrlora.training.config import TrainConfig

_DRAWS, _ORDER = 1, 2  # keep the streams of different purposes apart


@dataclass(frozen=True)
class Draw:
    """One batch: `rows` into the cached latents `[B]`, `captions` into the conditioning `[B]`, `sigmas` `[B]`, `noise`
    `[B, C, h, w]`, `weighting` `[B]` or None."""

    rows: Tensor
    captions: Tensor
    sigmas: Tensor
    noise: Tensor
    weighting: Tensor | None


def stream(*key: int) -> int:
    """A 63-bit seed from integers; different keys, of whatever length, give independent streams."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(stream(seed, _ORDER, epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())


def picture_rows(config: TrainConfig, count: int, step: int, micro: int, process: int, processes: int) -> list[int]:
    """Which pictures a batch uses: every epoch is a fresh permutation, so all pictures are seen equally often."""
    size = config.train_batch_size
    first = ((step * config.gradient_accumulation_steps + micro) * processes + process) * size
    return [_order(config.seed, item // count, count)[item % count] for item in range(first, first + size)]


def draw(
    config: TrainConfig, encoded: Encoded, table: Tensor, step: int, micro: int, process: int = 0, processes: int = 1
) -> Draw:
    """The random part of one batch, drawn on the CPU (the same on every device) and moved to the latents' device.

    Args:
        config: seed, batch size and weighting scheme are used.
        encoded: the cache drawn from.
        table: noise levels `[T]` on the CPU, largest first.
        step: optimiser steps taken so far.
        micro: accumulation index within the step.
        process: this process's rank of `processes`.
    """
    generator = torch.Generator().manual_seed(stream(config.seed, _DRAWS, step, micro, process))
    size, scheme = config.train_batch_size, config.weighting_scheme
    density: Any = compute_density_for_timestep_sampling(
        scheme, size, config.logit_mean, config.logit_std, config.mode_scale, generator=generator
    )
    sigmas = table[(density * len(table)).long().clamp_(0, len(table) - 1)]
    noise = torch.randn(size, *encoded.latents.shape[1:], generator=generator)
    pictures = torch.tensor(picture_rows(config, encoded.count, step, micro, process, processes))
    flipped = torch.rand(size, generator=generator) < 0.5
    rows = pictures + encoded.count * flipped if encoded.flips else pictures
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas) if scheme in ("sigma_sqrt", "cosmap") else None
    device = encoded.latents.device
    return Draw(
        rows=rows.to(device),
        captions=encoded.caption_rows[pictures.to(device)],
        sigmas=sigmas.to(device),
        noise=noise.to(device),
        weighting=None if weighting is None else weighting.to(device),
    )


def loss_of(family: Family, denoiser: nn.Module, encoded: Encoded, drawn: Draw, guidance: float) -> Tensor:
    """The batch's mean flow-matching loss, in fp32; pictures with a mask count within it alone, at the same scale."""
    clean = encoded.latents[drawn.rows]
    level = drawn.sigmas[:, None, None, None]
    noisy = torch.lerp(clean, drawn.noise, level)
    conditioning: Mapping[str, Tensor] = {key: rows[drawn.captions] for key, rows in encoded.conditioning.items()}
    velocity = family.predict(denoiser, noisy, drawn.sigmas, conditioning, guidance)
    return flow_loss(
        velocity, drawn.noise - clean, None if encoded.weights is None else encoded.weights[drawn.rows], drawn.weighting
    )


def flow_loss(velocity: Tensor, target: Tensor, mask_weights: Tensor | None, weighting: Tensor | None) -> Tensor:
    """Mean over everything of `weighting[n] * mask_weights[n, 1, h, w] * (velocity - target)^2`.

    Args:
        velocity: `[N, C, h, w]`, any dtype.
        target: likewise, fp32.
        mask_weights: `[N, 1, h, w]` with mean 1 a picture, or None.
        weighting: `[N]` by noise level, or None.
    """
    error = (velocity.float() - target).square()
    if mask_weights is not None:
        error = error * mask_weights
    if weighting is not None:
        error = error * weighting[:, None, None, None]
    return error.mean()
