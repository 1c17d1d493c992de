"""Whole training steps of a FLUX model: frozen, with ours, and with peft's LoRA as diffusers' scripts train it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from benchmarks.performance._layers import add_ours, add_peft, shared_copy
from benchmarks.performance._measure import kept_for_backward
from qrlora.adapter import target_layers
from qrlora.training import TrainConfig
from qrlora.training.optimiser import make_optimiser

FROZEN, OURS, PEFT, SCRIPT = "frozen model", "qrlora", "peft LoRA", "peft, fp32 adapters"


@dataclass
class Stepper:
    """A model that is trained, or a frozen one."""

    model: Any
    inputs: Mapping[str, Tensor]
    trained: list[nn.Parameter]
    optimiser: torch.optim.Optimizer | None = None
    own: bool = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """As training runs it: bf16 models under autocast; coefficients are cast by ours, activations by peft."""
        mixed = self.model.dtype == torch.bfloat16
        with (
            disable_input_dtype_casting(self.model, active=self.own and mixed),
            torch.autocast(self.model.device.type, torch.bfloat16, enabled=mixed),
        ):
            yield

    def forward(self) -> Tensor:
        """The prediction."""
        with self.running():
            return self.model(**self.inputs, return_dict=False)[0]

    def loss(self) -> Tensor:
        """A squared error, as in training."""
        predicted = self.forward().float()
        return F.mse_loss(predicted, torch.zeros_like(predicted))

    def step(self) -> None:
        """Forward and backward, and where something is trained: clip, step and clear."""
        self.inputs["hidden_states"].grad = None
        self.loss().backward()
        if self.optimiser is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)

    def kept(self) -> int:
        """Bytes kept between forward and backward."""
        return kept_for_backward(self.model, self.loss)


def stepper(name: str, base: Any, inputs: Mapping[str, Tensor], rank: int) -> Stepper:
    """A way to train, on a copy that shares the base's weights; the frozen model differentiates its input instead."""
    model = shared_copy(base)
    if name == FROZEN:
        given = {**inputs, "hidden_states": inputs["hidden_states"].detach().clone().requires_grad_(True)}
        return Stepper(model, given, [])
    if name == OURS:
        trained = add_ours(model, rank=rank)
        config = TrainConfig.parse({"instance_data_dir": "pictures", "output_dir": "out"})
        return Stepper(model, inputs, trained, make_optimiser(config, trained), own=True)
    trained = add_peft(model, rank, target_layers(base, "auto"), fp32=name == SCRIPT)
    # What the scripts build: no fused kernel.
    return Stepper(model, inputs, trained, torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4))


def steps(base: Any, inputs: Mapping[str, Tensor], rank: int, names: tuple[str, ...]) -> dict[str, Stepper]:
    """Several ways on one base."""
    return {name: stepper(name, base, inputs, rank) for name in names}


def calls(steppers: Mapping[str, Stepper]) -> dict[str, Callable[[], object]]:
    """For `interleaved`."""
    return {name: one.step for name, one in steppers.items()}
