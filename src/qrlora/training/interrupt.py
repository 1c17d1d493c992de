"""Ctrl-C while training: finish the step, save, then stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Interrupted(Exception):
    """The run was stopped by a signal and can be continued with `resume="latest"`.

    Attributes:
        step: optimiser steps taken.
        checkpoint: where they were saved.
        exit_code: what a command should exit with (130 for Ctrl-C, 143 for SIGTERM).
    """

    def __init__(self, step: int, checkpoint: Path, signal_number: int) -> None:
        super().__init__(
            f"stopped at step {step}; saved in {checkpoint}; continue with resume: latest (--resume latest)."
        )
        self.step = step
        self.checkpoint = checkpoint
        self.exit_code = 128 + signal_number


class StopRequest:
    """Set by the first signal; the second one stops at once."""

    def __init__(self) -> None:
        self.signal_number = 0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Within, SIGINT and SIGTERM only ask; outside the main thread, where Python sets no handlers, nothing changes."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
