"""What every row measures with: ways that take turns, bytes kept for backward, whole processes, the machine."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GIB, MIB = 2**30, 2**20
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "qrlora")


@dataclass(frozen=True)
class Times:
    """Seconds by way, one a turn."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, way: str) -> float:
        """Seconds of a way."""
        return statistics.median(self.seconds[way])

    def ratio(self, way: str, base: str) -> float:
        """The median over turns of a way's time over that of `base` in the same turn: what slows both cancels."""
        return statistics.median(a / b for a, b in zip(self.seconds[way], self.seconds[base], strict=True))

    def ratios(self, base: str) -> dict[str, float]:
        """All ways over `base`, rounded for a file."""
        return {way: round(self.ratio(way, base), 4) for way in self.seconds}

    def medians(self) -> dict[str, float]:
        """All ways' seconds, rounded for a file."""
        return {way: float(f"{self.median(way):.4g}") for way in self.seconds}


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    device: torch.device = CPU,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Time ways that take turns, so that whatever else the machine does falls on all of them.

    Args:
        ways: what is timed, by name.
        repeats: turns that count.
        device: waited for before and after each call where it is a GPU.
        warmup: turns before those.
        clock: seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(warmup + repeats):
        shift = turn % len(names)  # none is always the one after the slowest
        for name in names[shift:] + names[:shift]:
            wait(device)
            start = clock()
            ways[name]()
            wait(device)
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return Times(seconds)


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kept_for_backward(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, parameters left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    known |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            kept[place] = tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def process_seconds(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> tuple[float, str]:
    """Wall time of a whole process of this Python, and what it printed.

    Args:
        command: arguments of the interpreter.
        environment: added to this one; this checkout comes first on the path, and the hub is off.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    given = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
    given["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), given.get("PYTHONPATH", "")])
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=given, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return seconds, done.stdout


def peak_memory() -> int:
    """Bytes: the most this process has had in memory so far, files that it mapped included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """The machine without its name: processor, cores, threads used, memory, and the GPU where one is meant."""
    about: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def _processor() -> str:
    """What Linux calls it, with matrix instructions for bf16 where it has them: they decide the ratios."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.processor() or platform.machine())
    return f"{name}, AMX bf16" if "amx_bf16" in facts.get("flags", "") else name


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
