"""What families have in common and no caller needs."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.models._noise import FlowMatching

Made = TypeVar("Made", bound=Callable[..., Any])


_forget: list[Callable[[], None]] = []


def remembered(function: Made) -> Made:
    """Keep the tensors that a function made of its last few arguments."""
    kept = lru_cache(maxsize=8)(function)
    _forget.append(kept.cache_clear)
    return cast(Made, kept)


def forget_tensors() -> None:
    """Forget what `remembered` functions made: fakes and real tensors must not meet in there."""
    for forget in _forget:
        forget()


def check_size(multiple: int, height: int, width: int) -> None:
    """Refuse pixels that are not a multiple of `multiple`, naming the nearest that are.

    Raises:
        QrloraError: as said.
    """
    for name, value in (("height", height), ("width", width)):
        if value % multiple:
            raise QrloraError(
                f"{name}={value} must be a multiple of {multiple} for this model; {_round_to(value, multiple)} is."
            )


def _round_to(value: int, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


def require(pipeline: Any, components: tuple[str, ...]) -> None:
    """Refuse a pipeline without these components.

    Raises:
        QrloraError: names those that are missing.
    """
    missing = [name for name in components if getattr(pipeline, name, None) is None]
    if missing:
        raise QrloraError(
            f"the pipeline has no {' and '.join(missing)}; they were freed for training: restore_encoders() brings "
            "them back."
        )


def quiet(pipeline: Any) -> Any:
    """The same components behind a pipeline object that draws no progress bar, leaving the caller's as it is."""
    silent = copy.copy(pipeline)
    silent.set_progress_bar_config(disable=True)
    return silent


def encode_latents(vae: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`pixels` `[N, 3, H, W]` in [-1, 1] to latents `[N, C, h, w]` in fp32, shifted and scaled for the denoiser.

    Args:
        vae: an `AutoencoderKL`.
        pixels: on any device, of any dtype.
        generator: draws a sample; the mode of the posterior without one.
    """
    with torch.no_grad(), _upcast(vae):
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def flow_matching(scheduler: Any) -> FlowMatching:
    """The levels of a pipeline's own flow-matching scheduler, with its shift.

    A fresh one is asked: generating leaves the pipeline's on a short table.
    """
    fresh: Any = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    return FlowMatching(fresh.sigmas[: fresh.config.num_train_timesteps])


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """fp32 where the autoencoder asks for it: SDXL's overflows fp16, and bf16 costs every one digits."""
    dtype = vae.dtype
    if dtype == torch.float32 or not vae.config.force_upcast:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)  # exact: every weight came from there
