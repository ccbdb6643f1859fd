"""How far a stream of answers is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, BinaryIO, TextIO

PERIOD = 30.0  # seconds between lines


class Progress:
    """Counts answers and shows them on standard error.

    Args:
        total: bytes of the input, or None where they are not known.
        terminal: whether standard error is one.

    Attributes:
        answered: lines that were answered, failures among them.
        failed: lines that were not understood.
    """

    def __init__(self, total: int | None, terminal: bool):
        self.answered = self.failed = 0
        self._total, self._bytes = total, 0
        self._start = self._said = time.monotonic()
        self._bar: Any = None
        if terminal:
            self._bar, self._task = _bar(total)
            self._bar.start()

    def skipped(self, lines: int, size: int) -> None:
        """Some lines were answered by an earlier start."""
        self._bytes = size
        if lines:
            say(f"going on after {lines} lines that are answered")

    def add(self, lines: int, failed: int, size: int) -> None:
        """Some more lines were answered.

        Args:
            lines: how many.
            failed: how many of them were not understood.
            size: their bytes.
        """
        self.answered += lines
        self.failed += failed
        self._bytes += size
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bytes, description=str(self))
        elif time.monotonic() - self._said >= PERIOD:
            self._said = time.monotonic()
            part = f" ({self._bytes / self._total:.0%})" if self._total else ""
            say(f"{self}{part}")

    def __str__(self) -> str:
        rate = self.answered / max(time.monotonic() - self._start, 1e-9)
        return f"{self.answered} answered, {self.failed} of them errors, {rate:.1f} a second"

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()


def say(text: str) -> None:
    """A line on standard error; where nobody reads it any more, nothing."""
    if sys.stderr is None:
        return
    try:
        print(f"mpt-jax predict: {text}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        silence(sys.stderr)


def silence(stream: TextIO | BinaryIO) -> None:
    """What a stream still holds, and all that it is given, goes nowhere: else Python writes it when
    it ends, fails again, and exits with a code of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _bar(total: int | None) -> tuple[Any, Any]:
    from rich.console import Console  # only where there is a terminal: it takes time to import
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=24), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar = Bar(*columns, console=Console(stderr=True))
    return bar, bar.add_task("waiting", total=total)
