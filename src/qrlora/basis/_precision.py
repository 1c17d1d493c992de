"""Where and how exactly decompositions are computed, whatever the caller has switched on."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


def solving_device(device: torch.device) -> torch.device:
    """Where decompositions run: the weight's own device, but the CPU for one without fp64 (mps)."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def full_precision(device: torch.device) -> Generator[None, None, None]:
    """No gradients, autocast, TF32 or bf16 products inside the block; the caller's settings come back after it."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _ieee_products:
        yield


class _Switches:
    """Entered by any number of threads: the first one in switches, the last one out puts back what it found."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._put_back: Callable[[], None] = _nothing

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._put_back = _switch_to_ieee()
            self._inside += 1

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._put_back()


def _nothing() -> None: ...


_ieee_products = _Switches()


def _switch_to_ieee() -> Callable[[], None]:
    """Forbid TF32 and bf16 products; returns what gives back the caller's settings."""
    backends: Any = torch.backends
    candidates: list[Any] = [backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None)]
    switches = [x for x in candidates if hasattr(x, "fp32_precision")]
    # torch.set_float32_matmul_precision exists everywhere, but its getter raises once a caller has used these switches.
    if not switches:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(before)
    precisions: list[str] = [x.fp32_precision for x in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"

    def put_back() -> None:
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision

    return put_back
