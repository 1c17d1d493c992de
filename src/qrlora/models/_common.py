"""What families have in common and no caller needs."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.models._noise import Diffusion, FlowMatching

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
    latents = raw_latents(vae, pixels, generator)
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def raw_latents(vae: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """What an autoencoder makes of `pixels`, in fp32, neither shifted nor scaled; a sample, or the mode without a
    generator."""
    with torch.no_grad(), _upcast(vae):
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return (posterior.mode() if generator is None else posterior.sample(generator)).float()


def flow_matching(scheduler: Any) -> FlowMatching:
    """The levels of a pipeline's own flow-matching scheduler, with its shift.

    A fresh one is asked: generating leaves the pipeline's on a short table.
    """
    fresh: Any = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    return FlowMatching(fresh.sigmas[: fresh.config.num_train_timesteps])


# The part of a scheduler's configuration that says how the model was trained; the rest says how pictures are made.
_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def diffusion(scheduler: Any, unet: Any) -> Diffusion:
    """The levels of a U-Net that predicts noise or v, by the betas of the pipeline's own scheduler.

    Raises:
        QrloraError: a scheduler without betas, another prediction, or a U-Net that was distilled on guidance.
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if "beta_schedule" not in config:
        raise QrloraError(
            f"this model's {name} works on sigmas (EDM or flow matching) instead of a schedule of betas, and U-Nets of "
            "that kind cannot be trained here."
        )
    if prediction not in ("epsilon", "v_prediction"):
        raise QrloraError(
            f"this model predicts {prediction!r} by the configuration of its {name}, and U-Nets can be trained here "
            "where they predict 'epsilon' or 'v_prediction'."
        )
    if unet.config.time_cond_proj_dim is not None:
        raise QrloraError(
            "this U-Net takes the guidance scale as an input (a latent consistency model), which training does not "
            "give; train on the model it was distilled from."
        )
    try:
        schedule: Any = DDPMScheduler(**{key: config[key] for key in _SCHEDULE if key in config})
    except NotImplementedError as error:
        raise QrloraError(f"this model's {name} has a schedule that is not known here: {error}.") from error
    return Diffusion(schedule.alphas_cumprod, prediction)


def pad_rows(rows: Sequence[Tensor], length: int) -> dict[str, Tensor]:
    """Prompts of different lengths as conditioning: `prompt_embeds` `[N, length, D]`, zeros behind each, and
    `prompt_embeds_mask` `[N, length]`, 1 where there is text.

    Args:
        rows: `[L, D]` each, cut where longer.
        length: tokens of all.
    """
    embeds = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    mask = embeds.new_zeros(len(rows), length)
    for index, row in enumerate(rows):
        count = min(len(row), length)
        embeds[index, :count], mask[index, :count] = row[:count], 1
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}


def lengths_of(rows: Mapping[str, Tensor]) -> list[int]:
    """Tokens of each of the prompts that `pad_rows` padded; all of them where there is no mask."""
    count, length = rows["prompt_embeds"].shape[:2]
    mask = rows.get("prompt_embeds_mask")
    return [length] * count if mask is None else [int(each) for each in mask.float().sum(dim=1).tolist()]


def pack(latents: Tensor) -> Tensor:
    """`[N, C, h, w]` to `[N, h/2 * w/2, 4 C]`: tokens are 2 x 2 patches, channel-major within a token."""
    count, channels, height, width = latents.shape
    patches = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack`; `height` and `width` are those of the latents."""
    count, _, features = tokens.shape
    patches = tokens.reshape(count, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(count, features // 4, height, width)


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """fp32 where the autoencoder asks for it: SDXL's overflows fp16, and bf16 costs every one digits."""
    dtype = vae.dtype
    if dtype == torch.float32 or not vae.config.get("force_upcast", False):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)  # exact: every weight came from there
