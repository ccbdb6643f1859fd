"""Progress of a stream of answers: a bar on a terminal, otherwise a line every 30 s."""

from __future__ import annotations

import sys
import time
from typing import Any

from mpt_jax.runtime.exits import silence

PERIOD = 30.0  # seconds between lines


class Progress:
    """Counts answers and shows them on standard error.

    Args:
        total: the size of the input in bytes; None if unknown.
        terminal: whether standard error is a terminal.

    Attributes:
        answered: the number of answered lines, including invalid ones.
        failed: the number of invalid lines.
    """

    def __init__(self, total: int | None, terminal: bool):
        self.answered = self.failed = 0
        self._total, self._bytes = total, 0
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        if terminal:
            self._bar, self._task = _bar(total)
            self._bar.start()

    def skipped(self, lines: int, size: int) -> None:
        """Records lines that an interrupted command has already answered.

        Args:
            lines: the number of lines.
            size: their size in bytes.
        """
        self._bytes = size
        if lines:
            say(f"resuming after {lines} answered lines")

    def add(self, lines: int, failed: int, size: int) -> None:
        """Counts further answered lines.

        Args:
            lines: the number of lines.
            failed: the number of invalid lines among them.
            size: the size of the lines in bytes.
        """
        self.answered += lines
        self.failed += failed
        self._bytes += size
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bytes, description=str(self))
        elif time.monotonic() - self._last_line >= PERIOD:
            self._last_line = time.monotonic()
            part = f" ({self._bytes / self._total:.0%})" if self._total else ""
            say(f"{self}{part}")

    def __str__(self) -> str:
        rate = self.answered / max(time.monotonic() - self._start, 1e-9)
        return f"{self.answered} answered, {self.failed} of them errors, {rate:.1f} a second"

    def close(self) -> None:
        """Stops the bar; its last state stays on the terminal."""
        if self._bar is not None:
            self._bar.stop()


def say(text: str) -> None:
    """Prints a line on standard error. Prints nothing if standard error is closed."""
    if sys.stderr is None:
        return
    try:
        print(f"mpt-jax predict: {text}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        silence(sys.stderr)


def _bar(total: int | None) -> tuple[Any, Any]:
    from rich.console import Console  # slow to import, and needed only on a terminal
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=24), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar = Bar(*columns, console=Console(stderr=True))
    return bar, bar.add_task("waiting", total=total)
