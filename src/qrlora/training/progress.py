"""Progress on standard error: a bar on a terminal, otherwise a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.5
LINE_SECONDS = 15.0


class ProgressReport:
    """Counts towards `total`; `due()` says when showing something is worth reading a loss off the device."""

    def __init__(self, label: str, total: int, *, done: int = 0, shown: bool = True) -> None:
        self._label, self._total, self._first = label, total, done
        self._shown = shown
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = bar.add_task(label, total=total, completed=done, note="")
        self._start = self._last = time.monotonic()

    def start(self) -> Self:
        """Draw the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()

    @property
    def on_terminal(self) -> bool:
        """Whether a bar is drawn."""
        return self._bar is not None

    @property
    def slow(self) -> bool:
        """Whether it has taken long enough already for a line to be welcome."""
        return time.monotonic() - self._start >= LINE_SECONDS

    def due(self, done: int) -> bool:
        """Whether `show` would show anything."""
        if not self._shown:
            return False
        wait = REFRESH_SECONDS if self._bar else LINE_SECONDS
        return done == self._total or time.monotonic() - self._last >= wait

    def show_if_slow(self, done: int) -> None:
        """Show `done`, unless that is a line about what is over in a moment."""
        if self.due(done) and (self.on_terminal or self.slow):
            self.show(done)

    def show(self, done: int, note: str = "") -> None:
        """Show `done` of the total, with a short note."""
        now = self._last = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
            return
        spent = now - self._start
        left = spent / max(1, done - self._first) * (self._total - done)
        tail = f"{spent:.0f} s" if done == self._total else f"{left:.0f} s left"
        print(f"{self._label}: {done}/{self._total} {note} ({tail})", file=sys.stderr, flush=True)


@contextmanager
def counting(label: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """What counts (done, total) by itself, shown where it takes long; its total is known once it begins."""
    with ExitStack() as stack:
        report: ProgressReport | None = None

        def advance(done: int, total: int) -> None:
            nonlocal report
            report = report or stack.enter_context(ProgressReport(label, total, shown=shown))
            report.show_if_slow(done)

        yield advance
