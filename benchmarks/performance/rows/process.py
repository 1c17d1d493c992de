"""Whole processes: the start of the command line, and the demo."""

import tempfile
from pathlib import Path

from benchmarks.performance._measure import interleaved, process_seconds
from benchmarks.performance._row import Found, Goal, Row

SHORT = ("--max-train-steps", "1", "--num-inference-steps", "1", "--content-weights", "1", "--style-weights", "1")


def start(quick: bool) -> Found:
    """Beside an interpreter that does nothing."""
    ways = {
        "qrlora --help": ["-m", "qrlora", "--help"],
        "python -c pass": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
    }
    times = interleaved(
        {name: lambda command=command: process_seconds(command) for name, command in ways.items()}, 2 if quick else 15
    )
    seconds, least = times.median("qrlora --help"), times.median("python -c pass")
    return Found(
        f"{seconds:.3f} s",
        f"python alone {least:.3f} s, import torch {times.median('import torch'):.2f} s",
        (Goal("seconds", seconds, 0.3),),
        f"python alone takes {least:.3f} s",
        {"seconds": times.medians()},
    )


def demo(quick: bool) -> Found:
    """`qrlora blend` as `make demo` calls it, with no basis cached."""
    with tempfile.TemporaryDirectory() as folder:
        runs = iter(range(100))

        def blend() -> None:
            place = Path(folder) / str(next(runs))
            command = ["-m", "qrlora", "blend", "--output", str(place / "demo"), *(SHORT if quick else ())]
            process_seconds(command, environment={"QRLORA_CACHE": str(place / "cache")})

        times = interleaved({"demo": blend}, 1 if quick else 3, warmup=0)
    seconds = times.median("demo")
    return Found(
        f"{seconds:.1f} s",
        "",
        (Goal("seconds", seconds, 60),),
        "where the time goes stands in docs/performance.md",
        {"seconds": [round(value, 2) for value in times.seconds["demo"]]},
    )


ROWS = [
    Row("start", "start of `qrlora --help`", "", "under 0.3 s", start),
    Row("demo", "`make demo` after installation", "", "under 60 s on 2 cores", demo),
]
