"""Where and how exactly decompositions are computed, whatever the caller has switched on."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch


def solving_device(device: torch.device) -> torch.device:
    """Where decompositions run: the weight's own device, but the CPU for one without fp64 (mps)."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def full_precision(device: torch.device) -> Generator[None, None, None]:
    """No gradients, autocast, TF32 or bf16 products inside the block; the caller's settings come back after it."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _ieee_products():
        yield


@contextmanager
def _ieee_products() -> Generator[None, None, None]:
    backends: Any = torch.backends
    candidates: list[Any] = [backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None)]
    switches = [x for x in candidates if hasattr(x, "fp32_precision")]
    # torch.set_float32_matmul_precision exists everywhere, but its getter raises once a caller has used these switches.
    if not switches:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    precisions: list[str] = [x.fp32_precision for x in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = precision
