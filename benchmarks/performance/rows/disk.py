"""Files: how large an adapter is, and what merging two costs beside reading and writing them."""

import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.performance._copy import copy_bytes, copy_streamed, merge_files, watched
from benchmarks.performance._flux import RANK, adapter_of_size, layer_shapes
from benchmarks.performance._measure import GIB, MIB, interleaved, process_seconds
from benchmarks.performance._row import Found, Goal, Row

TINY = {f"transformer_blocks.{i}.attn.to_q": (64, 48) for i in range(3)}
PORTABLE, SMALL = 0.34, 0.17  # GiB, issue 6
# A layer of two files, both once more in float64 for their norms, the result and its bytes are 8; as much again for
# what the allocator does not give back. A whole file has 342.
LAYERS_HELD = 16
COPY, STREAMED = "reading and writing the bytes", "the same through our writer"


def _shapes(quick: bool) -> dict[str, tuple[int, int]]:
    return TINY if quick else layer_shapes()


def size(quick: bool) -> Found:
    """Files really written; the published pair of files from the shapes of its tensors, all fp32."""
    shapes, rank = _shapes(quick), 4 if quick else RANK
    with tempfile.TemporaryDirectory() as folder:
        adapter, place = adapter_of_size(shapes, rank, 1), Path(folder) / "adapter.safetensors"
        found: dict[str, int] = {}
        ways: dict[str, dict[str, Any]] = {
            "portable bf16": {"save_dtype": "bf16"},
            "portable fp32": {},
            "coefficients only bf16": {"save_dtype": "bf16", "coefficients_only": True},
        }
        for name, options in ways.items():
            found[name] = adapter.save(place, **options).stat().st_size
    pairs = list(shapes.values())
    factors = 4 * rank * sum(m + 2 * n for m, n in pairs)  # q, delta_r, base_r
    residual = 4 * sum(m * n for m, n in pairs)
    found |= {"published file": factors, "published residual file": residual}
    least = 2 * rank * sum(m + n for m, n in pairs)
    portable, small = found["portable bf16"] / GIB, found["coefficients only bf16"] / GIB
    return Found(
        f"{portable:.3f} GiB portable bf16, {small:.3f} GiB coefficients only",
        f"published {(factors + residual) / GIB:.2f} GiB ({factors / GIB:.2f} + {residual / GIB:.2f})",
        (
            # to the digits that the target has
            Goal("portable bf16, GiB", round(portable, 2), PORTABLE),
            Goal("coefficients only, GiB", round(small, 2), SMALL),
        ),
        f"Q and dR at two bytes a number are {least / GIB:.3f} GiB; the small file's fingerprints are r x r in fp32 a "
        "layer",
        {"layers": len(shapes), "rank": rank, "bytes": found},
    )


def worker(way: str, files: list[str], output: str, method: str, size: int, watch: bool) -> dict[str, Any]:
    """One way to put two files into one, in a process of its own: its seconds, or the memory that it takes beyond its
    imports, since watching that takes time too."""
    with watched() if watch else nullcontext({}) as memory:
        start, used = time.perf_counter(), time.process_time()
        if way == "merge":
            merge_files(files, output, method)
        else:
            (copy_bytes if way == COPY else copy_streamed)(files, output, size)
        taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    return dict(memory) if watch else taken


def _run(
    way: str, files: list[Path], output: Path, method: str, size: int, into: list[dict[str, Any]], watch: bool = False
) -> None:
    given = repr((way, [*map(str, files)], str(output), method, size, watch))
    code = f"import json; from benchmarks.performance.rows import disk; print(json.dumps(disk.worker(*{given})))"
    into.append(json.loads(process_seconds(["-c", code])[1].splitlines()[-1]))


def merging(quick: bool) -> Found:
    """Sum (one basis) and concatenation of two files, each beside a copy that reads and writes the same bytes and, like
    every file of ours, is a new one that is on the disk before it takes the old one's place. Imports do not count on
    any side, and memory is watched in a run of its own.

    The copy is the plain one that any tool makes, so ours may gain on it by writing while it computes; a second copy,
    through our own writer, shows what that gives.
    """
    shapes, rank, repeats = (TINY, 4, 1) if quick else (layer_shapes(), RANK, 3)
    details: dict[str, Any] = {"layers": len(shapes), "rank": rank}
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as folder:
        files = [adapter_of_size(shapes, rank, seed).save(Path(folder) / f"{seed}.safetensors") for seed in (1, 2)]
        inputs = sum(file.stat().st_size for file in files)
        largest = 4 * rank * max(m + n for m, n in shapes.values())
        for method in ("sum", "concat"):
            output, size = Path(folder) / "out.safetensors", inputs // 2 if method == "sum" else inputs
            runs: dict[str, list[dict[str, Any]]] = {"merge": [], COPY: [], STREAMED: []}
            watching: list[dict[str, Any]] = []
            _run("merge", files, output, method, size, watching, watch=True)  # also warms the files up
            ways = {way: partial(_run, way, files, output, method, size, found) for way, found in runs.items()}
            interleaved(ways, repeats, warmup=0)
            seconds = {way: statistics.median(run["seconds"] for run in found) for way, found in runs.items()}
            ratio, memory = seconds["merge"] / seconds[COPY], watching[0]["anonymous"]
            details[method] = {
                "bytes": inputs + size,
                "runs": runs,
                "watched": watching[0],
                "seconds": seconds,
                "ratio": round(ratio, 3),
                "memory": memory,
            }
            goals.append(Goal(f"{method}, over reading and writing", ratio, 1.5))
            goals.append(Goal(f"{method}, memory in layers", memory / largest, LAYERS_HELD))
    sums, concats = details["sum"], details["concat"]
    return Found(
        f"sum {sums['ratio']:.2f} x, {sums['memory'] / MIB:.0f} MiB; concatenation {concats['ratio']:.2f} x, "
        f"{concats['memory'] / MIB:.0f} MiB",
        f"copying {sums['seconds'][COPY]:.2f} s and {concats['seconds'][COPY]:.2f} s, through our writer "
        f"{sums['seconds'][STREAMED]:.2f} s and {concats['seconds'][STREAMED]:.2f} s",
        tuple(goals),
        f"a layer of the largest shape is {largest / MIB:.1f} MiB in fp32; files are {inputs / 2 / MIB:.0f} MiB each, "
        "and beside moving those bytes a merge checks and weighs them: the norms alone are 2 r^2 fp64 operations a row "
        "of each factor",
        details,
    )


ROWS = [
    Row(
        "disk",
        "adapter on disk, FLUX.1-dev r=64",
        "published file + residual",
        "0.34 GiB portable bf16, 0.17 GiB coefficients only",
        size,
    ),
    Row(
        "merge",
        "merging two FLUX-size files (fp32, r=64)",
        "reading and writing those bytes",
        "at most 1.5 x, memory of one layer (streamed)",
        merging,
    ),
]
