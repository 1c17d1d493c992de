"""What is drawn and what is minimised at one step, on cached latents.

Every draw is a function of (seed, step, batch of the step), so a run continued from step k sees what the uninterrupted
run sees, and what is drawn does not depend on how many processes share it (see `split`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor, nn

from qrlora.data import Encoded
from qrlora.errors import QrloraError
from qrlora.models import Diffusion, Family, NoiseProcess
from qrlora.training.config import TrainConfig
from qrlora.training.sampling import picture_rows, stream

_DRAWS, _CLASS_DRAWS = 1, 6  # keep these streams apart from those of other purposes, in sampling.py


@dataclass(frozen=True)
class Draw:
    """One batch: the `group` of pictures of one size, `rows` into its latents `[B]`, `captions` into the conditioning
    `[B]`, `index` into the noise levels `[B]`, `noise` `[B, C, h, w]`, `weighting` `[B]` or None."""

    group: int
    rows: Tensor
    captions: Tensor
    index: Tensor
    noise: Tensor
    weighting: Tensor | None

    def part(self, items: slice) -> "Draw":
        """Some of its items."""
        return Draw(
            self.group,
            self.rows[items],
            self.captions[items],
            self.index[items],
            self.noise[items],
            None if self.weighting is None else self.weighting[items],
        )


def draw(
    config: TrainConfig,
    encoded: Encoded,
    process: NoiseProcess,
    step: int,
    micro: int,
    *,
    of_class: bool = False,
) -> Draw:
    """The random part of one batch, on the CPU whatever computes, so that it is the same on every device.

    Args:
        config: seed, batch size and accumulation (as drawn), repeats, range and weighting of noise levels are used.
        encoded: the cache drawn from.
        process: the noise levels drawn from.
        step: optimiser steps taken so far.
        micro: index of the batch within the step.
        of_class: a batch of class pictures, drawn apart from those of the instance.
    """
    purpose = _CLASS_DRAWS if of_class else _DRAWS
    generator = torch.Generator().manual_seed(stream(config.seed, purpose, step, micro, 0))
    size = config.train_batch_size
    index = _levels(config, process, generator)
    chosen, pictures = picture_rows(config, encoded.counts, step, micro, of_class=of_class)
    group = encoded.groups[chosen]
    noise = torch.randn(size, *group.latents.shape[1:], generator=generator)
    variant = encoded.crops * ((torch.rand(size, generator=generator) < 0.5) & encoded.mirrored)
    if encoded.crops > 1:
        variant = variant + torch.randint(encoded.crops, (size,), generator=generator)
    rows = torch.tensor(pictures)
    return Draw(
        group=chosen,
        rows=rows + group.count * variant,
        captions=group.caption_rows[rows],
        index=index,
        noise=noise,
        weighting=level_weights(config, process, index),
    )


def _levels(config: TrainConfig, process: NoiseProcess, generator: torch.Generator) -> Tensor:
    """Indices `[B]` of noise levels within the configured range, by the scheme's density."""
    density: Any = compute_density_for_timestep_sampling(
        config.weighting_scheme,
        config.train_batch_size,
        config.logit_mean,
        config.logit_std,
        config.mode_scale,
        generator=generator,
    )
    first, last = level_range(config, process)
    return (first + (density * (last - first)).long()).clamp_(first, last - 1)


def level_range(config: TrainConfig, process: NoiseProcess) -> tuple[int, int]:
    """First index and the one past the last whose timesteps lie in [min_timestep, max_timestep].

    Raises:
        QrloraError: none does.
    """
    inside = (process.timesteps >= config.min_timestep) & (process.timesteps <= config.max_timestep)
    found = inside.nonzero().flatten()
    if not len(found):
        raise QrloraError(
            f"no noise level of this model has a timestep from min_timestep={config.min_timestep} to "
            f"max_timestep={config.max_timestep}; widen the range (0 is clean, 1000 pure noise)."
        )
    return int(found[0]), int(found[-1]) + 1


def check_levels(config: TrainConfig, process: NoiseProcess) -> None:
    """Refuse a range or a weighting of noise levels that the model cannot have, before anything is computed.

    Raises:
        QrloraError: as said.
    """
    first, _ = level_range(config, process)
    level_weights(config, process, torch.tensor([first]))


def level_weights(config: TrainConfig, process: NoiseProcess, index: Tensor) -> Tensor | None:
    """Loss weights `[B]` by noise level; None where all count alike.

    Raises:
        QrloraError: a weighting that the model's noise process does not have.
    """
    if config.snr_gamma is not None:
        return process.min_snr_weights(index, config.snr_gamma)
    if config.weighting_scheme not in ("sigma_sqrt", "cosmap"):
        return None
    if isinstance(process, Diffusion):
        raise QrloraError(
            f"weighting_scheme={config.weighting_scheme} is for models trained by flow matching; this one predicts "
            "noise or v: use snr_gamma instead."
        )
    return compute_loss_weighting_for_sd3(config.weighting_scheme, process.levels[index])


class Inputs(NamedTuple):
    """What the denoiser and the loss are given for one batch: latents and noise `[B, C, h, w]`, the conditioning's
    rows, mask weights `[B, 1, h, w]` and weights by noise level `[B]`, or None."""

    clean: Tensor
    noise: Tensor
    conditioning: Mapping[str, Tensor]
    mask_weights: Tensor | None
    weighting: Tensor | None


def inputs_of(encoded: Encoded, drawn: Draw, device: torch.device | str = "cpu") -> Inputs:
    """The drawn rows of the cache, on `device`: nothing is read from a disk, decoded or encoded at a step."""
    group = encoded.groups[drawn.group]
    captions = {key: _on(device, rows[drawn.captions]) for key, rows in encoded.conditioning.items()}
    places = {key: _on(device, rows[drawn.rows]) for key, rows in group.picture_conditioning.items()}
    return Inputs(
        _on(device, group.latents[drawn.rows]),
        _on(device, drawn.noise),
        captions | places,
        None if group.weights is None else _on(device, group.weights[drawn.rows]),
        None if drawn.weighting is None else _on(device, drawn.weighting),
    )


def loss_of(
    family: Family,
    denoiser: nn.Module,
    encoded: Encoded,
    drawn: Draw,
    process: NoiseProcess,
    guidance: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The batch's mean loss, in fp32, computed on `device`; pictures with a mask count within it alone, at the same
    scale."""
    given = inputs_of(encoded, drawn, device)
    noisy = process.noisy(given.clean, given.noise, drawn.index)
    levels = _on(device, process.levels[drawn.index])
    predicted = family.predict(denoiser, noisy, levels, given.conditioning, guidance)
    target = process.target(given.clean, given.noise, drawn.index)
    return weighted_loss(predicted, target, given.mask_weights, given.weighting)


def _on(device: torch.device | str, tensor: Tensor) -> Tensor:
    """From the CPU to where it is computed, on CUDA without waiting for what runs there."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def weighted_loss(predicted: Tensor, target: Tensor, mask_weights: Tensor | None, weighting: Tensor | None) -> Tensor:
    """Mean over everything of `weighting[n] * mask_weights[n, 1, h, w] * (predicted - target)^2`.

    Args:
        predicted: `[N, C, h, w]`, any dtype.
        target: likewise, fp32.
        mask_weights: `[N, 1, h, w]` with mean 1 a picture, or None.
        weighting: `[N]` by noise level, or None.
    """
    error = (predicted.float() - target).square()
    if mask_weights is not None:
        error = error * mask_weights
    if weighting is not None:
        error = error * weighting[:, None, None, None]
    return error.mean()
