"""What a frozen lora_A saves: memory kept for the backward pass and time of adapters on one layer, by side.

    python -m benchmarks.sides              # 3072 x 3072 and 12288 x 3072 at 1024 tokens and rank 64, minutes on a core
    python -m benchmarks.sides --small      # 512 x 512 and 2048 x 512 at 256 tokens and rank 16, seconds

One frozen Linear by itself and with an adapter on it, as training runs it: in fp32, and in bf16 under autocast with
coefficients in fp32. Its input needs a gradient, as all but a model's first layers' do. Bytes are counted, not
computed: all that autograd saves while the layer runs (`saved_tensors_hooks`), parameters left out, each storage once.
A frozen layer needs its weight alone, so all of them are the adapter's. The ways take turns in one run: compare the
ratios. On a CPU it is the process's own time on one thread that counts, so other work beside it disturbs little.

What that comes to in a model, where attention, norms and activations keep tensors of their own, is counted on the
embedded base with all its usual layers adapted: one forward pass of a training step.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from benchmarks.basis import RESULTS, describe
from qrlora import starter
from qrlora.adapter import AdapterSpec, BasisCache, add_adapter, remove_adapter
from qrlora.models import load_pipeline

FULL, SMALL = ([(3072, 3072), (12288, 3072)], 1024, 64), ([(512, 512), (2048, 512)], 256, 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FROZEN = "the frozen layer alone"
# A random basis costs nothing to make, and what runs afterwards is the same for every basis.
WAYS: dict[str, dict[str, Any]] = {
    "side output (lora_B frozen)": {"basis": "random", "side": "output"},
    "side input (lora_A frozen)": {"basis": "random", "side": "input"},
    "plain LoRA": {"basis": "lora"},
}

Row = dict[str, str | int | float]


class OneLayer(nn.Module, PeftAdapterMixin):
    """A denoiser of one layer, for `add_adapter`."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(shape[1], shape[0], device=device, dtype=dtype)
        self.requires_grad_(False)


def layer_with(spec: dict[str, Any] | None, shape: tuple[int, int], rank: int, setting: "Setting") -> OneLayer:
    """The frozen layer, the same each time, with an adapter of `spec` on it."""
    model = OneLayer(shape, setting.dtype, setting.device)
    if spec is not None:
        with tempfile.TemporaryDirectory() as folder:
            add_adapter(
                model, AdapterSpec(rank=rank, target_modules=["layer"], **spec), "adapter", cache=BasisCache(folder)
            )
    return model


class Setting:
    """Where and in which precision; bf16 as `qrlora train` does it."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.dtype, self.device = name, DTYPES[name], device

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        mixed = self.dtype == torch.bfloat16
        with (
            disable_input_dtype_casting(model, active=mixed),
            torch.autocast(self.device.type, torch.bfloat16, enabled=mixed),
        ):
            yield

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor], setting: Setting) -> dict[int, int]:
    """What autograd keeps between forward and backward: bytes by the address of their storage, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            kept[place] = tensor  # held, so that no other storage takes its place
        return tensor

    with setting.running(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return {place: tensor.untyped_storage().nbytes() for place, tensor in kept.items()}


def seconds(model: OneLayer, x: Tensor, gradient: Tensor, setting: Setting) -> float:
    """Time of forward and backward: the process's own on a CPU, else wall time."""
    clock = time.process_time if setting.device.type == "cpu" else time.perf_counter
    x.grad = None
    model.zero_grad(set_to_none=True)
    setting.wait()
    start = clock()
    with setting.running(model):
        y = model.layer(x)
    y.backward(gradient)
    setting.wait()
    return clock() - start


def compare(shape: tuple[int, int], tokens: int, rank: int, repeats: int, setting: Setting) -> list[Row]:
    """One row a way, for one layer in one precision."""
    generator = torch.Generator().manual_seed(1)
    x, gradient = (
        torch.randn(tokens, size, generator=generator).to(setting.device, setting.dtype) for size in reversed(shape)
    )
    x.requires_grad_(True)
    models = {name: layer_with(spec, shape, rank, setting) for name, spec in {FROZEN: None, **WAYS}.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            taken = seconds(model, x, gradient, setting)
            if turn:  # the first turn warms up
                times[name].append(taken)
    ratios = {
        name: statistics.median(one / base for one, base in zip(taken, times[FROZEN], strict=True))
        for name, taken in times.items()
    }
    rows: list[Row] = []
    for name, model in models.items():
        kept = kept_bytes(model, partial(model.layer, x), setting)
        rows.append(
            {
                "shape": f"{shape[0]} x {shape[1]}",
                "tokens": tokens,
                "rank": rank,
                "dtype": setting.name,
                "way": name,
                "kept_bytes": sum(kept.values()),
                "kept_bytes_of_input": kept.get(x.untyped_storage().data_ptr(), 0),
                "seconds": round(statistics.median(times[name]), 4),
                "ratio": round(ratios[name], 3),
            }
        )
    return rows


def whole_model(setting: Setting) -> list[Row]:
    """One row a way, for the embedded base with its own resolution, rank and batch."""
    loaded = load_pipeline(starter.path(), dtype=setting.dtype, device=setting.device)
    rank, batch = int(loaded.training["rank"]), int(loaded.training["train_batch_size"])
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(batch, 3, 64, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        latents = loaded.family.encode_pictures(loaded.pipeline, picture.to(setting.device, setting.dtype))
        prompts = loaded.family.encode_prompts(loaded.pipeline, ["a <c> emoji in noto style"] * batch, 32)
    sigmas = torch.rand(batch, generator=generator).to(setting.device)
    rows: list[Row] = []
    for name, spec in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            layers = add_adapter(loaded.denoiser, AdapterSpec(rank=rank, **spec), "adapter", cache=BasisCache(folder))
        forward = partial(loaded.family.predict, loaded.denoiser, latents, sigmas, prompts, 1.0)
        kept = sum(kept_bytes(loaded.denoiser, forward, setting).values())
        rows.append({"layers": len(layers), "rank": rank, "batch": batch, "dtype": setting.name, "way": name})
        rows[-1] |= {"kept_bytes": kept, "ratio": round(kept / int(rows[0]["kept_bytes"] if rows[1:] else kept), 3)}
        remove_adapter(loaded.denoiser, "adapter")
    return rows


def markdown(report: dict[str, str | int], rows: list[Row], model_rows: list[Row]) -> str:
    """The report as a page."""
    setting = (
        f"`{report['command']}` on {report['device']}; torch {report['torch']}, Python {report['python']}; median of "
        f"{report['repeats']}, ways taking turns. {rows[0]['tokens']} tokens, rank {rows[0]['rank']}; the input x "
        "needs a gradient. Kept: what autograd keeps for the backward pass beyond parameters. Of which not x: what is "
        "left where another layer keeps the same input anyway. Ratio: time of forward and backward over that of the "
        "frozen layer in the same turn."
    )
    lines = [
        "# Sides of an adapter",
        "",
        setting,
        "",
        "| layer (out x in) | precision | way | kept, MiB | of which not x | seconds | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kept, of_input = int(row["kept_bytes"]), int(row["kept_bytes_of_input"])
        cells = [row["shape"], row["dtype"], row["way"], f"{kept / 2**20:.2f}", f"{(kept - of_input) / 2**20:.2f}"]
        lines.append(f"| {' | '.join(str(x) for x in [*cells, row['seconds'], row['ratio']])} |")
    lines += [
        "",
        (
            f"The embedded base with {model_rows[0]['layers']} layers adapted at rank {model_rows[0]['rank']}, one "
            f"forward pass of a training step on {model_rows[0]['batch']} pictures. Ratio: to side output."
        ),
        "",
        "| precision | way | kept, MiB | ratio |",
        "|---|---|---|---|",
    ]
    for row in model_rows:
        lines.append(f"| {row['dtype']} | {row['way']} | {int(row['kept_bytes']) / 2**20:.1f} | {row['ratio']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the comparison and writes `sides.json` and `sides.md`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="smaller layers, seconds on one core")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for sides.json and sides.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    shapes, tokens, rank = SMALL if options.small else FULL
    report: dict[str, str | int] = {
        "command": shlex.join(["python", "-m", "benchmarks.sides", *sys.argv[1:]]),
        "device": describe(device),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "repeats": options.repeats,
    }
    rows = [
        row
        for shape in shapes
        for name in DTYPES
        for row in compare(shape, tokens, rank, options.repeats, Setting(name, device))
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    model_rows = [row for name in DTYPES for row in whole_model(Setting(name, device))]
    everything = {**report, "rows": rows, "embedded_base": model_rows}
    (options.output / "sides.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    page = markdown(report, rows, model_rows)
    (options.output / "sides.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
