"""Several processes of one launch, as `accelerate launch` and `torchrun` start them, on the CPU."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def start(
    code: str, *arguments: str, processes: int = 2, folder: Path, environment: Mapping[str, str] | None = None
) -> list["subprocess.Popen[bytes]"]:
    """Run Python `code` in each process; what one says goes to `folder/said-RANK.txt`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[subprocess.Popen[bytes]] = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        own |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **(environment or {})}
        with (folder / f"said-{rank}.txt").open("wb") as said:
            command = [sys.executable, "-c", code, *arguments]
            started.append(subprocess.Popen(command, env=os.environ | own, stdout=said, stderr=said))
    return started


def finish(started: Sequence["subprocess.Popen[bytes]"], folder: Path, timeout: float = 1800) -> tuple[list[int], str]:
    """Exit codes, and all that was said."""
    try:
        codes = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return codes, "\n".join((folder / f"said-{rank}.txt").read_text() for rank in range(len(started)))
