"""Times the basis solvers against full SVD + full QR of the rank-r core, and measures how far off each span is.

    python benchmarks/basis.py              # 3072 x 3072 and 12288 x 3072 at rank 64, some minutes on two cores
    python benchmarks/basis.py --small      # 1024 x 1024 and 2048 x 1024 at rank 32, under a minute

Baseline and solvers take turns in one run, so compare the ratios, not seconds between runs. Weights are fp32 with
Haar-random singular vectors and s_i = i^-0.5. Angles are largest principal angles to the stored weight's float64 SVD.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qrlora.basis import make_basis, principal_angle

RESULTS = Path(__file__).parent / "results"
FULL, SMALL = ([(3072, 3072), (12288, 3072)], 64), ([(1024, 1024), (2048, 1024)], 32)
BASELINE = "full SVD + full QR"

Row = dict[str, str | int | float]


def power_law(d: int, n: int, device: torch.device, seed: int = 0) -> Tensor:
    """`[d, n]` fp32 with s_i = i^-0.5."""
    generator = torch.Generator().manual_seed(seed)
    k = min(d, n)
    u, v = (torch.linalg.qr(torch.randn(x, k, generator=generator).to(device)).Q for x in (d, n))
    values = torch.arange(1, k + 1, device=device, dtype=torch.float32) ** -0.5
    return (u * values) @ v.T


def full_svd_and_qr(weight: Tensor, rank: int) -> Tensor:
    """The published way: truncated SVD, then the QR decomposition of the whole rank-r core."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return torch.linalg.qr((u[:, :rank] * s[:rank]) @ vh[:rank]).Q[:, :rank]


def seconds(call: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Wall time of one call, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def compare(shape: tuple[int, int], rank: int, repeats: int, device: torch.device) -> list[Row]:
    """One row a way of getting Q, for one weight."""
    weight = power_law(*shape, device)
    truth = torch.linalg.svd(weight.double(), full_matrices=False).U[:, :rank]
    bounds: dict[str, float] = {}

    def solver(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            basis = make_basis(weight, rank, solver=name)  # pyright: ignore[reportArgumentType]
            bounds[name] = basis.angle
            return basis.vectors

        return call

    ways: dict[str, Callable[[], Tensor]] = {BASELINE: lambda: full_svd_and_qr(weight, rank)}
    ways |= {name: solver(name) for name in ("auto", "krylov", "gram", "exact")}
    ways["torch.svd_lowrank q=r niter=4"] = lambda: torch.svd_lowrank(weight, q=rank, niter=4)[0]
    times: dict[str, list[float]] = {name: [] for name in ways}
    angles: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, call in ways.items():
            taken, vectors = seconds(call, device)
            if turn:  # the first turn warms up
                times[name].append(taken)
            angles[name] = principal_angle(vectors, truth)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    return [
        {
            "shape": f"{shape[0]} x {shape[1]}",
            "rank": rank,
            "way": name,
            "seconds": round(median[name], 4),
            "ratio": round(median[name] / median[BASELINE], 3),
            "angle_degrees": float(f"{angles[name]:.2g}"),
            **({"bound_degrees": float(f"{bounds[name]:.2g}")} if name in bounds else {}),
        }
        for name in ways
    ]


def describe(device: torch.device) -> str:
    """The device and its threads, without the machine's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}"


def markdown(report: dict[str, str | int], rows: list[Row]) -> str:
    """The report as a page."""
    setting = (
        f"`{report['command']}` on {report['device']}; torch {report['torch']}, Python {report['python']}; median of "
        f"{report['repeats']}, ways taking turns. Ratio: time over that of {BASELINE} (fp32). Angle: largest principal "
        "angle to the float64 SVD's span, bound: what the solver itself reported, in degrees."
    )
    lines = [
        "# Basis solvers",
        "",
        setting,
        "",
        "| weight | r | way | seconds | ratio | angle | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["shape"], row["rank"], row["way"], row["seconds"], row["ratio"], row["angle_degrees"]]
        lines.append(f"| {' | '.join(str(x) for x in [*cells, row.get('bound_degrees', '')])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the comparison and writes `basis.json` and `basis.md`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="smaller weights, under a minute on one core")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for basis.json and basis.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    shapes, rank = SMALL if options.small else FULL
    report: dict[str, str | int] = {
        "command": shlex.join(["python", "benchmarks/basis.py", *sys.argv[1:]]),
        "device": describe(device),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "repeats": options.repeats,
    }
    rows: list[Row] = []
    for shape in shapes:
        rows += compare(shape, rank, options.repeats, device)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "basis.json").write_text(json.dumps({**report, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    page = markdown(report, rows)
    (options.output / "basis.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
