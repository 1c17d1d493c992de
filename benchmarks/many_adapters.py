"""Many adapters on one base: what switching, a batch of different ones and their memory cost.

    python -m benchmarks.many_adapters              # a hundred on the embedded base, a minute or two on a core
    python -m benchmarks.many_adapters --count 10 --repeats 3

One hundred adapters of the base's usual layers and rank, on one basis, with random coefficients, once in an
`AdapterBank` and once attached through peft. Switching is from one adapter to the next: `AdapterBank.switch`, which
sums up all that the next pass needs, and `set_adapters`. A pass is one call of the denoiser on eight pictures; the ways
take turns, so compare the ratios. Bytes are those of all parameters, buffers and tensors of the bank, counted, not
estimated. On a CPU it is the process's own time on one thread that counts, so other work beside it disturbs little.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qrlora import starter
from qrlora.adapter import (
    AdapterBank,
    AdapterSpec,
    BasisCache,
    adapter_of,
    add_adapter,
    attach_adapter,
    remove_adapter,
    set_adapters,
)
from qrlora.formats import Adapter, LowRank
from qrlora.models import LoadedModel, load_pipeline

RESULTS = Path(__file__).parent / "results"
PICTURES = 8
Inputs = tuple[Tensor, Tensor, Mapping[str, Tensor]]


def clock(device: torch.device) -> float:
    """Seconds, once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def made(denoiser: nn.Module, rank: int, count: int) -> list[Adapter]:
    """Adapters on one basis, of random coefficients."""
    add_adapter(denoiser, AdapterSpec(rank=rank, mask="full"), "made", cache=BasisCache())
    like = adapter_of(denoiser, "made")
    remove_adapter(denoiser, "made")
    generator = torch.Generator().manual_seed(0)
    return [
        Adapter(
            {
                name: LowRank(pair.B, 0.02 * torch.randn(pair.A.shape, generator=generator))
                for name, pair in like.layers.items()
            },
            like.header,
            like.component,
        )
        for _ in range(count)
    ]


def inputs(loaded: LoadedModel, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Noise, levels and prompts of eight pictures."""
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(PICTURES, 3, 64, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        latents = loaded.family.encode_pictures(loaded.pipeline, picture.to(device, dtype))
        prompts = loaded.family.encode_prompts(loaded.pipeline, ["a <c> emoji"] * PICTURES, 32)
    return latents, torch.rand(PICTURES, generator=generator).to(device), prompts


def one_pass(loaded: LoadedModel, given: Inputs, rows: slice = slice(None)) -> Tensor:
    """One call of the denoiser."""
    latents, levels, prompts = given
    with torch.no_grad():
        part = {key: value[rows] for key, value in prompts.items()}
        return loaded.family.predict(loaded.denoiser, latents[rows], levels[rows], part, 1.0)


def bytes_of(denoiser: nn.Module) -> int:
    """Of all its parameters and buffers, each storage once."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def switching(choose: Callable[[int], object], count: int, repeats: int, device: torch.device) -> float:
    """Median milliseconds of one switch to the next adapter."""
    taken: list[float] = []
    for turn in range(repeats + 1):
        for number in range(count):
            start = clock(device)
            choose(number)
            if turn:  # the first turn warms up
                taken.append(1e3 * (clock(device) - start))
    return statistics.median(taken)


def passes(ways: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds a way, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = clock(device)
            way()
            if turn:
                taken[name].append(clock(device) - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def measure(count: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Everything, as it is written."""
    loaded = load_pipeline(starter.path(), dtype=torch.float32, device=device)
    denoiser, rank = loaded.denoiser, int(loaded.training["rank"])
    adapters, given = made(denoiser, rank, count), inputs(loaded, device, torch.float32)
    numbers = 4 * sum(pair.A.numel() for pair in adapters[0].layers.values())
    shared = 4 * sum(pair.B.numel() for pair in adapters[0].layers.values())
    base_bytes = bytes_of(denoiser)
    bank = AdapterBank(loaded.pipeline)
    start = clock(device)
    for number, adapter in enumerate(adapters):
        bank.add(f"a{number}", adapter)
    adding = (clock(device) - start) / count
    singles = [{f"a{i % count}": 0.8} for i in range(PICTURES)]
    pairs = [{f"a{i % count}": 0.8, f"a{(i + PICTURES) % count}": 0.5} for i in range(PICTURES)]
    ways = {"the base alone": [], "one adapter for all": singles[:1], "eight adapters": singles}
    ways["eight pairs of adapters"] = pairs

    def drawn(rows: list[dict[str, float]]) -> Tensor:
        bank.switch(rows)
        return one_pass(loaded, given)

    found = {name: drawn(rows) for name, rows in ways.items()}
    seconds = passes({name: lambda rows=rows: drawn(rows) for name, rows in ways.items()}, repeats, device)
    switch = switching(lambda number: bank.switch([{f"a{number}": 0.8}]), count, repeats, device)
    switch_eight = switching(
        lambda number: bank.switch([{f"a{(number + i) % count}": 0.8} for i in range(PICTURES)]), count, repeats, device
    )
    bank_bytes, grown = bank.nbytes, bytes_of(denoiser) - base_bytes
    bank.close()
    start = clock(device)
    for number, adapter in enumerate(adapters):
        attach_adapter(denoiser, adapter, f"a{number}")
    attaching = (clock(device) - start) / count
    peft_bytes = bytes_of(denoiser) - base_bytes
    peft_switch = switching(lambda number: set_adapters(denoiser, {f"a{number}": 0.8}), count, 1, device)

    def apart(rows: list[dict[str, float]]) -> Tensor:
        parts: list[Tensor] = []
        for i, row in enumerate(rows):
            set_adapters(denoiser, row)
            parts.append(one_pass(loaded, given, slice(i, i + 1)))
        return torch.cat(parts)

    differences = {
        name: float((found[name] - apart(rows)).abs().max()) for name, rows in ways.items() if len(rows) == PICTURES
    }
    acted = float((found["eight adapters"] - found["the base alone"]).abs().max())
    seconds["eight adapters, one picture after the other, by peft"] = passes(
        {"apart": lambda: apart(singles)}, max(1, repeats // 3), device
    )["apart"]
    return {
        "adapters": count,
        "layers": len(adapters[0].layers),
        "rank": rank,
        "coefficients_bytes": numbers,
        "basis_bytes": shared,
        "due_bytes": count * numbers + shared,
        "bank_bytes": bank_bytes,
        "denoiser_grew_by": grown,
        "peft_bytes": peft_bytes,
        "adding_ms": round(1e3 * adding, 2),
        "attaching_ms": round(1e3 * attaching, 2),
        "switching_ms": round(switch, 3),
        "switching_eight_ms": round(switch_eight, 3),
        "switching_peft_ms": round(peft_switch, 1),
        "passes": {
            name: {"seconds": round(value, 4), "ratio": round(value / seconds["the base alone"], 2)}
            for name, value in seconds.items()
        },
        "differences": differences,
        "adapters_change_by": acted,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    mib = 2**20
    setting = (
        f"`{report['command']}` on {report['device']}; torch {report['torch']}, Python {report['python']}; medians of "
        f"{report['repeats']}. {report['adapters']} adapters of {report['layers']} layers at rank {report['rank']} on "
        "the embedded base, fp32."
    )
    memory = (
        f"An adapter's coefficients are {report['coefficients_bytes'] / mib:.3f} MiB and the basis that all share "
        f"{report['basis_bytes'] / mib:.3f}; together that is {report['due_bytes']} bytes, and the bank holds "
        f"{report['bank_bytes']}. The denoiser grew by {report['denoiser_grew_by']}."
    )
    differences = ", ".join(f"{value:.1e} ({name})" for name, value in report["differences"].items())
    equality = (
        f"Largest difference of a mixed batch from its pictures alone, by peft's layers: {differences}. The adapters "
        f"change the output by up to {report['adapters_change_by']:.2f}."
    )
    lines = [
        "# Many adapters on one base",
        "",
        setting,
        "",
        "| | bank | attached through peft |",
        "|---|---|---|",
        f"| memory of all, MiB | {report['bank_bytes'] / mib:.1f} | {report['peft_bytes'] / mib:.1f} |",
        f"| taking one in, ms | {report['adding_ms']} | {report['attaching_ms']} |",
        f"| switching to another, ms | {report['switching_ms']} | {report['switching_peft_ms']} |",
        f"| switching to eight others, ms | {report['switching_eight_ms']} | |",
        "",
        memory,
        "",
        "| one pass of eight pictures, choosing included | ratio to the base alone |",
        "|---|---|",
        *(f"| {name} | {way['ratio']} |" for name, way in report["passes"].items()),
        "",
        equality,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes `many_adapters.json` and `many_adapters.md`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for many_adapters.json and .md")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": "python -m benchmarks.many_adapters " + shlex.join(sys.argv[1:]),
        "device": f"CPU, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}"
        if device.type == "cpu"
        else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "repeats": options.repeats,
        **measure(options.count, options.repeats, device),
    }
    report["command"] = report["command"].strip()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "many_adapters.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output / "many_adapters.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
