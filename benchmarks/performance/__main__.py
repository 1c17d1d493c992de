"""`python -m benchmarks.performance [ROW ...]` (`make bench`): measure, write the results, print the table.

Results land in benchmarks/results/performance: a JSON file a row (a row measured again replaces itself), `table.md` and
pictures, and the table once more in docs/performance.md.
"""

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.performance._measure import CPU, machine, versions
from benchmarks.performance._row import NotHere, Row
from benchmarks.performance.plots import draw_all
from benchmarks.performance.rows import ROWS
from benchmarks.performance.table import (
    DOCUMENT,
    NO_GPU,
    RESULTS,
    Result,
    plain,
    read_results,
    result_of,
    write_result,
    write_table,
)


def measure(row: Row, *, quick: bool) -> Result:
    """One row, with how it was run.

    Raises:
        NotHere: what it needs is not here; a GPU, mostly.
    """
    if row.device == "cuda" and not torch.cuda.is_available():
        raise NotHere(NO_GPU)
    about: dict[str, Any] = {
        "command": f"python -m benchmarks.performance {row.name}" + (" --quick" if quick else ""),
        "machine": machine(torch.device("cuda") if row.device == "cuda" else CPU),
        "versions": versions(),
    }
    start = time.perf_counter()
    found = row.measure(quick)
    gc.collect()
    return result_of(row, found, about | {"took_seconds": round(time.perf_counter() - start, 1)})


def main(rows: Sequence[str] = (), /, quick: bool = False, output: Path = RESULTS) -> None:
    """Measure rows and print the table.

    Args:
        rows: names, see the table; all of them where none is given.
        quick: tiny sizes, to try it out: the numbers say nothing, so nothing is written beside the real results.
        output: folder of the results; the documentation is changed for the usual one alone.
    """
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise SystemExit(f"there is no row {unknown[0]}; there are: {', '.join(ROWS)}.")
    chosen, skipped, fresh = list(rows or ROWS), dict[str, str](), dict[str, Result]()
    kept = not quick or output != RESULTS
    for name in chosen:
        print(f"{name}: {ROWS[name].what}", flush=True)
        try:
            fresh[name] = measure(ROWS[name], quick=quick)
        except NotHere as reason:
            skipped[name] = str(reason)
            continue
        print(f"  {fresh[name]['measured']} ({fresh[name]['took_seconds']} s)", flush=True)
        if kept:
            write_result(fresh[name], output)
    if kept and output.is_dir():
        draw_all(read_results(output), output)
        write_table(output, DOCUMENT if output == RESULTS else None)
    print("\n" + plain({**read_results(output), **fresh}, skipped, chosen))


if __name__ == "__main__":
    tyro.cli(main)
