"""AdamW over the coefficients, and the learning rate as a function of the step."""

from collections.abc import Callable, Iterable, Mapping

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from qrlora.training.config import TrainConfig


def make_optimiser(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with fp32 states (the coefficients are fp32), fused: one pass over the parameters instead of ten."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=True,
    )


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


def optimiser_tensors(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Parameters and states as `param/NAME`, `exp_avg/NAME`, ..."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"param/{name}"] = parameter.detach()
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    return tensors


def load_optimiser_tensors(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """The inverse of `optimiser_tensors`; `KeyError` and shape errors are the caller's to name."""
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "param":
            with torch.no_grad():
                parameters[name].copy_(value)
        else:
            states[name][key.partition("/")[0]] = value
    for name, parameter in parameters.items():
        if not states[name]:
            continue
        # AdamW keeps its step count where the fused kernel runs, and the moments beside the parameter.
        optimiser.state[parameter] = {
            key: value.clone().to(parameter.device, torch.float32) for key, value in states[name].items()
        }
