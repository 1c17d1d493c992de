"""What training keeps: tensors for the backward pass, gradients and optimiser states."""

from typing import Any

import torch

from benchmarks.performance._flux import RANK, distinct_shapes, flux_inputs, flux_model, layer_shapes
from benchmarks.performance._layers import (
    OURS,
    OURS_INPUT,
    PEFT,
    PUBLISHED,
    SCRIPT,
    Setting,
    add_ours,
    add_peft,
    shared_copy,
    way,
)
from benchmarks.performance._measure import GIB, MIB, kept_for_backward
from benchmarks.performance._row import Found, Goal, Row
from benchmarks.performance._steps import FROZEN, Stepper, stepper
from qrlora.adapter import target_layers
from qrlora.training import TrainConfig
from qrlora.training.optimiser import make_optimiser

WAYS = (OURS, OURS_INPUT, PEFT, SCRIPT, PUBLISHED)


def _kept_of(setting: Setting) -> dict[str, int]:
    x, _ = setting.tensors()
    kept: dict[str, int] = {}
    for name in WAYS:
        one = way(name, setting)
        kept[name] = kept_for_backward(one.model, lambda one=one: one.forward(x))
    return kept


def kept(quick: bool) -> Found:
    """One layer in bf16 and fp32, and a small FLUX whole, where attention and norms keep tensors of their own."""
    n, tokens, rank = (64, 32, 4) if quick else (3072, 1024, RANK)
    layers: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        layers[str(dtype).removeprefix("torch.")] = _kept_of(Setting((n, n), tokens, rank, dtype))
    base = flux_model(*((64, 1, 1) if quick else (512, 2, 4)), torch.bfloat16)
    inputs = flux_inputs(base, 64 if quick else 256, 1)
    model = {FROZEN: stepper(FROZEN, base, inputs, rank).kept()}
    for side in ("output", "input"):
        one = shared_copy(base)
        model[OURS if side == "output" else OURS_INPUT] = Stepper(
            one, inputs, add_ours(one, rank=rank, side=side), own=True
        ).kept()
    for name in (PEFT, SCRIPT):
        model[name] = stepper(name, base, inputs, rank).kept()
    half = layers["bfloat16"]
    hidden = tokens * rank * 2
    goals = (
        Goal("output side over peft", half[OURS] / half[PEFT], 1.0),
        Goal("input side over T x r", half[OURS_INPUT] / hidden, 1.0),
        Goal("output side over peft, fp32", layers["float32"][OURS] / layers["float32"][PEFT], 1.0),
        Goal("input side over T x r, fp32", layers["float32"][OURS_INPUT] / (2 * hidden), 1.0),
    )
    told = {name: f"{value / MIB:.2f} MiB" for name, value in half.items()}
    return Found(
        f"output side {told[OURS]}, input side {told[OURS_INPUT]}",
        f"{PEFT} {told[PEFT]}, {SCRIPT} {told[SCRIPT]}, {PUBLISHED} {told[PUBLISHED]}",
        goals,
        f"x is T x in: {tokens * n * 2 / MIB:.2f} MiB; x A^T is T x r: {hidden / MIB:.3f} MiB; coefficients cast to "
        f"bf16 are r x in: {rank * n * 2 / MIB:.2f} MiB",
        {"n": n, "tokens": tokens, "rank": rank, "layer": layers, "small_flux": model},
    )


def _training_bytes(model: Any, trained: list[torch.nn.Parameter], config: TrainConfig) -> int:
    """Gradients and states after a real step."""
    optimiser = make_optimiser(config, trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    states = [t for state in optimiser.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.ndim]
    return sum(t.numel() * t.element_size() for t in [*states, *(p.grad for p in trained if p.grad is not None)])


def optimiser(quick: bool) -> Found:
    """Counted on a small FLUX after a step of the real optimiser, and worked out for FLUX.1-dev from its shapes."""
    rank = 4 if quick else RANK
    base = flux_model(*((64, 1, 1) if quick else (512, 2, 4)), torch.float32)
    config = TrainConfig.parse({"instance_data_dir": "pictures", "output_dir": "out"})
    ours, theirs = shared_copy(base), shared_copy(base)
    own = _training_bytes(ours, add_ours(ours, rank=rank), config)
    other = _training_bytes(theirs, add_peft(theirs, rank, target_layers(base, "auto")), config)
    shapes = distinct_shapes(layer_shapes())
    coefficients = sum(count * RANK * n for (_, n), count in shapes.items())
    lora = sum(count * RANK * (m + n) for (m, n), count in shapes.items())
    ratio = own / other
    small = f"{own / MIB:.1f} of {other / MIB:.1f} MiB on a small FLUX"
    return Found(
        f"{ratio:.2f} ({small}; FLUX.1-dev {12 * coefficients / GIB:.2f} GiB)",
        f"peft LoRA 1 (FLUX.1-dev {12 * lora / GIB:.2f} GiB)",
        (Goal("bytes over LoRA's", round(ratio, 3), 0.5), Goal("the same for FLUX.1-dev", coefficients / lora, 0.5)),
        "12 bytes a trained number (gradient and two moments in fp32), r x in of a LoRA's r x (in + out)",
        {"bytes": {"qrlora": own, "peft LoRA": other}, "flux_dev": {"qrlora": coefficients, "peft LoRA": lora}},
    )


ROWS = [
    Row(
        "kept",
        "memory kept for the backward pass (one layer, bf16, n=3072, T=1024, r=64)",
        "peft LoRA",
        "output side: the same or less; input side: T x r",
        kept,
    ),
    Row("optimiser", "gradients + optimiser states", "LoRA at the same rank", "0.5", optimiser),
]
