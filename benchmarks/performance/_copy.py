"""Two files into one, by us and by a bare copy, and what that takes of a process's memory."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.performance._measure import peak_memory
from qrlora.formats import read_adapter
from qrlora.merging import merge

CHUNK = 1 << 22


def merge_files(paths: Sequence[str], output: str, method: str) -> None:
    """As `qrlora merge` does it."""
    merge([read_adapter(path, lazy=True) for path in paths], method=method).save(output)


def copy_bytes(paths: Sequence[str], output: str, size: int) -> None:
    """Read all of `paths` and write `size` bytes of it, safely on the disk as `qrlora.formats.atomic_write` has it."""
    left, buffer = size, bytearray(CHUNK)
    with open(output, "wb") as target:
        for path in paths:
            with open(path, "rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    left -= target.write(memoryview(buffer)[: min(count, left)])
        target.flush()
        os.fsync(target.fileno())


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Bytes this process grows by at most, within: in all, and in memory of its own (`anonymous`), without the pages of
    files that it maps, which the system drops when it needs them. The latter is looked at every millisecond."""
    found = {"anonymous": 0, "all": 0}
    before, peak, done = _anonymous(), peak_memory(), threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            found["anonymous"] = max(found["anonymous"], _anonymous() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found["all"] = peak_memory() - peak


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
