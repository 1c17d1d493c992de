"""What the two trainings share: a cosine schedule, an average of the weights, checkpoints, and a line of progress."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def cosine(step: int, steps: int, warmup: int) -> float:
    """The factor on the learning rate at `step`: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def generator(seed: int, step: int) -> torch.Generator:
    """The random source of one step, so that a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed((seed << 32) + step)


class Average:
    """An exponential moving average of a module's floating-point state."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = module.state_dict()
        keys = [k for k, v in self.state.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.state[k] for k in keys], [current[k] for k in keys], 1 - decay)


@dataclass
class Run:
    """One resumable training: `step_loss(step)` returns the loss of a step's batch.

    Args:
        folder: where the checkpoint and the log lie.
        module: everything that is trained.
        steps: optimiser steps in all.
        learning_rate: the peak of the cosine schedule.
        save_every: steps between checkpoints.
    """

    folder: Path
    module: nn.Module
    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    decay: float = 0.999
    save_every: int = 200
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.average = Average(self.module, self.decay)
        self.step = 0
        self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        tensors = load_file(self.checkpoint)
        self.step = int(tensors["step"])
        self.module.load_state_dict(_part(tensors, "module"))
        self.average.state = _part(tensors, "average")
        for name, parameter in self.module.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }

    def save(self) -> None:
        """Write the checkpoint beside the old one, then put it in its place."""
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        tensors |= {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state.items()}
        for name, parameter in self.module.named_parameters():
            state = self.optimizer.state.get(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = state[key] if state else torch.zeros_like(parameter)
        partial = self.checkpoint.with_suffix(".partial")
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, partial)
        os.replace(partial, self.checkpoint)

    def go(self, step_loss: Callable[[int], Tensor], every: Callable[[int], None] | None = None) -> None:
        """Train to the last step; `every(step)` is called after each checkpoint."""
        start, started, losses = self.step, time.monotonic(), []
        for step in range(self.step + 1, self.steps + 1):
            self.step = step
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * cosine(self.step - 1, self.steps, self.warmup)
            loss = step_loss(self.step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.average.update(self.module, self.step)
            losses.append(loss.detach())
            if self.step % 50 == 0 or self.step == self.steps:
                self._report(start, started, torch.stack(losses).mean().item())
                losses.clear()
            if self.step % self.save_every == 0 or self.step == self.steps:
                self.save()
                if every is not None:
                    every(self.step)

    def _report(self, start: int, started: float, loss: float) -> None:
        if not math.isfinite(loss):
            raise SystemExit(
                f"The loss is {loss} at step {self.step}: lower --learning-rate; the last checkpoint is kept."
            )
        seconds = time.monotonic() - started
        left = seconds / (self.step - start) * (self.steps - self.step)
        print(
            f"step {self.step}/{self.steps}  loss {loss:.4f}  {seconds / 60:.1f} min, {left / 60:.1f} left", flush=True
        )
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": self.step, "loss": round(loss, 6), "seconds": round(seconds, 1)}) + "\n")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}


def batches(count: int, size: int, seed: int, step: int) -> Tensor:
    """The indices of step `step` when `count` items are shuffled anew each epoch, `size` [size] int64."""
    return torch.tensor(list(_stream(count, size, seed, step)))


def _stream(count: int, size: int, seed: int, step: int) -> Iterator[int]:
    first = (step - 1) * size
    for position in range(first, first + size):
        epoch, place = divmod(position, count)
        yield _permutation(count, seed, epoch)[place]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, epoch)).tolist()
