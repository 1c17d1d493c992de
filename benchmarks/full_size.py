"""`python -m benchmarks.full_size`: full-size models with random weights on a GPU: peak memory and time of a step.

Neither depends on the values, so no weights are needed. Every row stands beside its estimate. Written into
benchmarks/results/full_size.json and .md, with the device and the versions.
"""

import gc
import json
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from qrlora.adapter import AdapterSpec, add_adapter, set_adapters, trainable_parameters
from qrlora.models import Blueprint, LoadedModel, quantized_layers, read_blueprint
from qrlora.models._quantization import prepare_for_training
from qrlora.training import TrainConfig, estimate
from qrlora.training.objective import weighted_loss
from qrlora.training.optimiser import make_optimiser

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
ROWS: dict[str, dict[str, Any]] = {
    "bf16": {"gradient_checkpointing": True},
    "bf16, no checkpointing": {},
    "bf16, streamed": {"offload": "blocks"},
    "int8": {"quantization": "int8", "gradient_checkpointing": True},
    "nf4": {"quantization": "nf4", "gradient_checkpointing": True},
    "nf4, streamed": {"quantization": "nf4", "offload": "blocks"},
}


def filled(denoiser: Any, config: TrainConfig, device: torch.device) -> nn.Module:
    """A denoiser on the meta device with random weights on the CPU or the device, quantised as `config` says."""
    kept = torch.device("cpu") if config.offload == "blocks" else device
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    packed = set(quantized_layers(denoiser)) if config.quantization is not None else set[str]()
    for name, module in list(denoiser.named_modules()):
        for key, value in module._parameters.items():
            if value is not None:
                made = torch.empty(value.shape, dtype=dtype, device=device).normal_(std=0.02)
                module._parameters[key] = nn.Parameter(made if name in packed else made.to(kept), requires_grad=False)
        for key, value in module._buffers.items():
            if value is not None:
                module._buffers[key] = torch.zeros(value.shape, dtype=value.dtype, device=kept)
        if name in packed:
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, quantised(module, str(config.quantization), dtype).to(kept))
    return denoiser


def quantised(layer: Any, kind: str, dtype: torch.dtype) -> nn.Module:
    """One linear layer, packed as loading would pack it."""
    if kind == "nf4":
        import bitsandbytes as bnb

        made = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, dtype, True, "nf4", device="meta"
        )
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to(
            layer.weight.device
        )
        made.bias = layer.bias
        return made
    import torchao.quantization as torchao

    holder = nn.Sequential(layer)
    torchao.quantize_(holder, torchao.Int8WeightOnlyConfig() if kind == "int8" else torchao.Float8WeightOnlyConfig())
    return holder[0].requires_grad_(False)


def measure(config: TrainConfig, blueprint: Blueprint, device: torch.device, steps: int) -> dict[str, Any]:
    """Peak bytes and seconds of a step."""
    family = blueprint.family
    denoiser = filled(blueprint.denoiser, config, device)
    model = LoadedModel(SimpleNamespace(**{family.component: denoiser}), family, blueprint.model_id, None)  # type: ignore[arg-type]
    model.offload = config.offload
    if config.quantization is not None:
        prepare_for_training(denoiser)
    model.load_denoiser(device)
    add_adapter(denoiser, config.adapter, "measured", device=device)
    set_adapters(denoiser, {"measured": 1.0})
    model.settle()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = list(trainable_parameters(denoiser, "measured").values())
    optimiser = make_optimiser(config, parameters)
    clean, conditioning = inputs(config, blueprint, denoiser, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")
    seconds: list[float] = []
    for step in range(steps + 2):
        if step == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        noise, levels = torch.randn_like(clean), torch.full((len(clean),), 0.5, device=device)
        with autocast:
            noisy = torch.lerp(clean, noise, levels[:, None, None, None])
            predicted = family.predict(denoiser, noisy, levels, conditioning, 1.0)
            loss = weighted_loss(predicted, noise - clean, None, None)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"seconds": statistics.median(seconds[2:]), "peak": peak, "loss": float(loss.detach())}


def inputs(
    config: TrainConfig, blueprint: Blueprint, denoiser: nn.Module, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents and conditioning of one batch."""
    family, rows = blueprint.family, config.train_batch_size
    assert config.resolution is not None
    side = config.resolution // blueprint.vae_scale_factor
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    defaults = family.generation_defaults.model_dump() | blueprint.settings.generation
    shapes = family.conditioning_shapes(denoiser, defaults["max_sequence_length"])
    conditioning = {name: torch.randn(rows, *shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    return torch.randn(rows, family.latent_channels(denoiser), side, side, device=device), conditioning


def main(
    models: Sequence[str] = ("flux-dev", "sd3.5-large", "sd3.5-medium", "sdxl"),
    /,
    rows: Sequence[str] = tuple(ROWS),
    resolution: int = 512,
    rank: int = 64,
    steps: int = 10,
    device: str = "cuda",
    output: Path = RESULTS,
) -> None:
    """Measure every row of every model.

    Args:
        models: as `qrlora estimate` knows them, or folders.
        rows: which settings.
        resolution: pixels of a side.
        rank: of the adapter.
        steps: measured, after two more.
        device: cuda, or cpu to try this out.
        output: folder of the results.
    """
    place = torch.empty(0, device=device).device
    found: list[dict[str, Any]] = []
    for model in models:
        blueprint = read_blueprint(model)
        for row in rows:
            values = {"instance_data_dir": "pictures", "output_dir": "out", "resolution": resolution, "device": device}
            config = TrainConfig.parse(
                values
                | {"adapter": AdapterSpec(rank=rank, basis="random").model_dump()}
                | {"mixed_precision": "bf16" if place.type == "cuda" else "no"}
                | ROWS[row]
            )
            expected = estimate(config, blueprint)
            entry = {"model": model, "row": row, "estimate": expected.phases[1].total, "host": expected.host}
            found.append(entry | measure(config, blueprint, place, steps))
            print(found[-1], flush=True)
            gc.collect()
            if place.type == "cuda":
                torch.cuda.empty_cache()
    results = {
        "device": torch.cuda.get_device_name() if place.type == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "settings": {"resolution": resolution, "rank": rank, "steps": steps, "train_batch_size": 1, "basis": "random"},
        "rows": found,
    }
    (output / "full_size.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"`python -m benchmarks.full_size`, {results['device']}, {results['versions']}, {results['settings']}",
        "",
        "| model | settings | peak GiB | estimate | s a step |",
        "|---|---|---|---|---|",
    ]
    for entry in found:
        peak = "" if entry["peak"] is None else f"{entry['peak'] / GIB:.2f}"
        lines.append(
            f"| {entry['model']} | {entry['row']} | {peak} | {entry['estimate'] / GIB:.2f} | {entry['seconds']:.3f} |"
        )
    (output / "full_size.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
