"""The bases of all FLUX.1-dev layers: computed, and from the cache."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.performance._flux import RANK, distinct_shapes, flux_model, layer_shapes
from benchmarks.performance._measure import CPU, Times, interleaved
from benchmarks.performance._row import Found, Goal, Row
from qrlora.adapter import (
    AdapterSpec,
    BasisCache,
    adaptable_layers,
    add_adapter,
    by_layer,
    remove_adapter,
    target_layers,
)
from qrlora.basis import make_basis, principal_angle
from qrlora.models import read_blueprint

FULL, OURS, CHEAP, PASS = "full SVD + QR", "qrlora", "torch.svd_lowrank q=r niter=4", "one pass"
ADAPTER = "adapter"
TINY = {(96, 64): 2, (64, 96): 1}


def power_law(shape: tuple[int, int], device: torch.device, seed: int = 0) -> Tensor:
    """`[out, in]` fp32 with random singular vectors and s_i = i^-0.5."""
    generator, k = torch.Generator().manual_seed(seed), min(shape)
    u, v = (torch.linalg.qr(torch.randn(x, k, generator=generator).to(device)).Q for x in shape)
    values = torch.arange(1, k + 1, device=device, dtype=torch.float32) ** -0.5
    return (u * values) @ v.T


def full_svd_and_qr(weight: Tensor, rank: int) -> Tensor:
    """The published way: truncated SVD, then the QR decomposition of the whole rank-r core."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return torch.linalg.qr((u[:, :rank] * s[:rank]) @ vh[:rank]).Q[:, :rank]


def computed(quick: bool, device: torch.device = CPU) -> Found:
    """One weight of each distinct shape, its time counted as often as the model has that shape.

    Ours computes layers side by side on a CPU, as `add_adapter` does: here as many of one weight as there are threads.
    The published way has all threads for each.
    """
    shapes, rank, repeats = (TINY, 4, 1) if quick else (distinct_shapes(layer_shapes()), RANK, 3)
    together = torch.get_num_threads() if device.type == "cpu" else 1
    totals = dict.fromkeys((FULL, OURS, CHEAP, PASS), 0.0)
    rows = []
    for shape, count in shapes.items():
        weight = power_law(shape, device)
        truth = torch.linalg.svd(weight.double(), full_matrices=False).U[:, :rank]
        block = torch.randn(shape[1], rank, generator=torch.Generator().manual_seed(1)).to(device)
        found: dict[str, Tensor] = {}

        def keep(name: str, make: Callable[[], Tensor], found: dict[str, Tensor] = found) -> Callable[[], None]:
            return lambda: found.update({name: make()})

        ways: dict[str, Callable[[], object]] = {
            FULL: keep(FULL, lambda weight=weight: full_svd_and_qr(weight, rank)),
            OURS: keep(OURS, lambda weight=weight: _side_by_side(weight, rank, together)),
            CHEAP: keep(CHEAP, lambda weight=weight: torch.svd_lowrank(weight, q=rank, niter=4)[0]),
            PASS: lambda weight=weight, block=block: weight.T @ (weight @ block),
        }
        times = interleaved(ways, repeats, device=device)
        times = Times({**times.seconds, OURS: [value / together for value in times.seconds[OURS]]})
        for name in totals:
            totals[name] += count * times.median(name)
        rows.append(
            {
                "shape": list(shape),
                "layers": count,
                "seconds": times.medians(),
                "degrees": {name: float(f"{principal_angle(Q, truth):.2g}") for name, Q in found.items()},
                "bound_degrees": float(f"{make_basis(weight, rank).angle:.2g}"),
            }
        )
    factor, angle = totals[FULL] / totals[OURS], max(row["degrees"][OURS] for row in rows)
    passes, off = totals[OURS] / totals[PASS], max(row["degrees"][CHEAP] for row in rows)
    return Found(
        f"{factor:.1f} x faster ({totals[OURS]:.0f} s), {angle:.2g} degrees",
        f"{FULL} {totals[FULL]:.0f} s; {CHEAP} {totals[CHEAP]:.0f} s, but {off:.0f} degrees off",
        (Goal("times faster", factor, 10, at_most=False), Goal("largest angle, degrees", angle, 0.01)),
        f"W^T (W X) with {rank} columns in fp32 takes {totals[PASS]:.1f} s over all layers; ours takes as long as "
        f"{passes:.0f} such passes, 20 x faster would leave {totals[FULL] / 20 / totals[PASS]:.0f}",
        {
            "rank": rank,
            "layers": sum(shapes.values()),
            "weights": "fp32, random singular vectors, s_i = i^-0.5; one of each shape is timed",
            "seconds": {name: round(value, 2) for name, value in totals.items()},
            "shapes": rows,
        },
    )


def _side_by_side(weight: Tensor, rank: int, count: int) -> Tensor:
    """The basis of one weight, so many times at once."""
    names = [str(i) for i in range(count)]
    found = list(by_layer(lambda _: make_basis(weight, rank).vectors, names, at_once=count))
    return found[0]


def cached(quick: bool) -> Found:
    """What a second training waits for: `add_adapter` on FLUX.1-dev's denoiser, its 342 bases in the folder.

    The adapted weights are overlapping windows of one bf16 buffer, all different, so that they fit into any machine,
    and no other weight is there; the files are in the system's page cache, as after a first run. They hold random
    bases: reading and checking are the same.
    """
    denoiser: Any = flux_model(64, 1, 1, torch.bfloat16) if quick else read_blueprint("flux-dev").denoiser
    weights, rank = _windows(denoiser), 4 if quick else RANK
    spec = AdapterSpec(rank=rank, basis="random")
    with tempfile.TemporaryDirectory() as folder:
        cache = BasisCache(folder)

        def add() -> None:
            BasisCache.forget()
            add_adapter(denoiser, spec, ADAPTER, cache=cache)
            remove_adapter(denoiser, ADAPTER)

        def look_up() -> None:
            BasisCache.forget()
            list(by_layer(lambda name: cache.get(weights[name], spec, name), list(weights)))

        def read() -> None:
            for path in Path(folder).iterdir():
                path.read_bytes()

        add()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        ways = {OURS: add, "the bases alone": look_up, "reading the bytes": read}
        times = interleaved(ways, 1 if quick else 5, warmup=0)
        BasisCache.forget()
    seconds, rows = times.median(OURS), sum(len(weight) for weight in weights.values())
    return Found(
        f"{seconds:.2f} s, of it the bases {times.median('the bases alone'):.2f} s",
        f"reading the files' {size / 2**20:.0f} MiB alone {times.median('reading the bytes'):.2f} s",
        (Goal("seconds", seconds, 3.0),),
        f"checking that Q^T Q is the identity is {2 * rank**2 * rows / 1e9:.1f} GFLOP in all, the fingerprint as much "
        f"in fp64; {2 * len(weights)} linear layers are made, by peft",
        {"layers": len(weights), "rank": rank, "bytes": size, "seconds": times.medians()},
    )


def _windows(denoiser: Any) -> dict[str, Tensor]:
    """Weights by layer, given to the layers that are adapted."""
    modules: dict[str, Any] = adaptable_layers(denoiser)
    shapes = {name: tuple(modules[name].weight.shape) for name in target_layers(denoiser, "auto")}
    size = max(m * n for m, n in shapes.values()) + 64 * len(shapes)
    buffer = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weights = {name: buffer[64 * i : 64 * i + m * n].view(m, n) for i, (name, (m, n)) in enumerate(shapes.items())}
    for name, weight in weights.items():
        modules[name].weight = nn.Parameter(weight, requires_grad=False)
    return weights


ROWS = [
    Row(
        "basis",
        "basis of all 342 FLUX.1-dev layers (r=64)",
        "full SVD + QR of the published code",
        "10 x faster, largest principal angle at most 0.01 degrees",
        computed,
    ),
    Row(
        "basis-gpu",
        "the same on a GPU",
        "full SVD + QR of the published code",
        "10 x faster, largest principal angle at most 0.01 degrees",
        lambda quick: computed(quick, torch.device("cuda")),
        "cuda",
    ),
    Row("basis-cache", "the same from the cache, and the adapter on the model", "computing it", "under 3 s", cached),
]
