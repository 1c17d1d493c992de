"""Optimisers over the coefficients, their state as tensors, and the learning rate as a function of the step."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from qrlora.adapter import zero_masked
from qrlora.errors import QrloraError, QrloraWarning
from qrlora.training.config import TrainConfig

GROUP = "group/"
_EIGHT_BIT_LEAST = 4096  # numbers in a parameter from which bitsandbytes keeps its states in 8 bits


def check_packages(config: TrainConfig) -> None:
    """Refuse an optimiser whose package is not installed, before anything is loaded.

    Raises:
        QrloraError: names the package.
    """
    wanted = (
        ("prodigyopt", f"optimizer: {config.optimizer}", config.optimizer == "prodigy"),
        ("bitsandbytes", "use_8bit_adam", config.use_8bit_adam),
    )
    for package, key, needed in wanted:
        if needed and find_spec(package) is None:
            raise QrloraError(f"{key} needs the package {package}, which is not installed; pip install {package}.")


def make_optimiser(
    config: TrainConfig, parameters: Iterable[nn.Parameter], words: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """AdamW, AdamW with 8-bit states, or Prodigy, over fp32 coefficients.

    Args:
        config: the optimiser's settings.
        parameters: of the denoiser's adapter.
        words: of text encoders' adapters, a group of their own with `text_encoder_lr`.

    Raises:
        QrloraError: a package that is not installed, or that cannot compute on the parameters' device.
    """
    check_packages(config)
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if words := list(words):
        groups.append({"params": words, "lr": config.text_encoder_lr or config.learning_rate})
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if config.optimizer == "prodigy":
        return _prodigy(config, groups, settings)
    if config.use_8bit_adam:
        return _eight_bit(groups, settings)
    # fused: one pass over the parameters instead of ten
    return torch.optim.AdamW(groups, **settings, fused=True)


def _prodigy(config: TrainConfig, groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    if config.learning_rate != 1:
        warnings.warn(
            f"learning_rate={config.learning_rate:g} multiplies the rate that prodigy finds; 1.0 is what it is made "
            "for.",
            QrloraWarning,
            stacklevel=2,
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it decays weights
        return Prodigy(
            groups,
            **settings,
            beta3=config.prodigy_beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
        )


def _eight_bit(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
    trial = nn.Parameter(torch.zeros(_EIGHT_BIT_LEAST, device=parameters[0].device))
    trial.grad = torch.zeros_like(trial)
    try:
        AdamW8bit([trial], min_8bit_size=_EIGHT_BIT_LEAST).step()
    except (NotImplementedError, RuntimeError) as error:
        words = str(error).partition("\n")[0].rstrip(".")
        raise QrloraError(
            f"use_8bit_adam: the installed bitsandbytes cannot compute on {trial.device.type} ({words}); drop it, or "
            "train on CUDA."
        ) from error
    optimiser = AdamW8bit(groups, min_8bit_size=_EIGHT_BIT_LEAST, **settings)
    # On a CPU its codes for a moment of zero are not exactly zero, so masked coefficients would creep.
    optimiser.register_step_post_hook(lambda *_: zero_masked(parameters))
    return optimiser


def set_rates(config: TrainConfig, optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give the denoiser's group a learning rate, and text encoders theirs in the same proportion as in `config`."""
    optimiser.param_groups[0]["lr"] = rate
    for group in optimiser.param_groups[1:]:
        group["lr"] = rate * ((config.text_encoder_lr or config.learning_rate) / config.learning_rate)


def learning_rates(config: TrainConfig) -> Callable[[int], float]:
    """diffusers' schedule as a pure function of the steps taken, so that resuming needs no scheduler state."""
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = get_scheduler(
        config.lr_scheduler,
        stand_in,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))


def optimiser_tensors(optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters and states as `param/NAME`, `exp_avg/NAME`, ..., and what a group of parameters counts (Prodigy's
    estimate) as `group/INDEX.KEY`.

    Plain numbers become int64 and float64 scalars, which no state tensor is.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"param/{name}"] = parameter.detach()
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = _as_tensor(value)
    for index, group in enumerate(optimiser.param_groups):
        for key, value in group.items():
            # The learning rate is set at every step; what is at its default was never counted.
            if key != "lr" and type(value) in (int, float) and value != optimiser.defaults.get(key):
                tensors[f"{GROUP}{index}.{key}"] = _as_tensor(value)
    return tensors


def load_optimiser_tensors(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimiser_tensors`; `KeyError` and shape errors are the caller's to name."""
    states: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if key.startswith(GROUP):
            index, _, entry = name.partition(".")
            optimiser.param_groups[int(index)][entry] = _from_tensor(value)
        elif kind == "param":
            with torch.no_grad():
                parameters[name].copy_(value)
        else:
            states[name][kind] = _from_tensor(value)
    for name, parameter in parameters.items():
        if states[name]:
            # AdamW keeps its step count where the fused kernel runs, and the moments beside the parameter.
            optimiser.state[parameter] = {
                key: value.clone().to(parameter.device) if isinstance(value, Tensor) else value
                for key, value in states[name].items()
            }


def _as_tensor(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _from_tensor(value: Tensor) -> Tensor | float:
    return value.item() if value.ndim == 0 and value.dtype in (torch.int64, torch.float64) else value
