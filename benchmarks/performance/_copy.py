"""Two files into one, by us and by a bare copy, and what that takes of a process's memory."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.performance._measure import peak_memory
from qrlora.formats import atomic_write, read_adapter
from qrlora.merging import merge_to_file

CHUNK = 1 << 22


def merge_files(paths: Sequence[str], output: str, method: str) -> None:
    """As `qrlora merge` does it."""
    merge_to_file([read_adapter(path, lazy=True) for path in paths], output, method=method)


def copy_bytes(paths: Sequence[str], output: str, size: int) -> None:
    """Read all of `paths` and write `size` bytes of it, as durably and atomically as files of ours, and otherwise
    plainly: a new file, one fsync of it, a rename over the old one, an fsync of the folder."""
    temporary = Path(f"{output}.tmp")
    with temporary.open("xb") as target:
        for chunk in _bytes_of(paths, size):
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    os.replace(temporary, output)
    folder = os.open(temporary.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def copy_streamed(paths: Sequence[str], output: str, size: int) -> None:
    """The same through our own writer, which sets the disk to work early and does not keep what was written in memory;
    beside it stands what a merge takes beyond moving bytes."""
    atomic_write(output, _bytes_of(paths, size))


def _bytes_of(paths: Sequence[str], size: int) -> Iterator[memoryview]:
    """The first `size` bytes of files that are read to their end, in one buffer."""
    left, buffer = size, bytearray(CHUNK)
    for path in paths:
        with open(path, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                yield memoryview(buffer)[: min(count, left)]
                left -= min(count, left)


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
