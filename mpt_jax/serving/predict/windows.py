"""Windows of input lines: all lines that are waiting or arrive within 20 ms, up to a limit."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator

# Seconds that a window stays open after its first line.
PATIENCE = 0.02


def windows(lines: Iterable[bytes], size: int, patience: float = PATIENCE) -> Iterator[list[bytes]]:
    """Yields lists of 1 to `size` lines, in order.

    A thread reads ahead. If lines arrive faster than they are answered, for example from a file,
    windows are full. If lines are typed by hand, each window holds one line. A window closes
    `patience` seconds after its first line, so no line waits longer than that for others.

    Args:
        lines: the input; it may block between lines.
        size: the maximum number of lines in a window. Up to two windows are read ahead.
        patience: the seconds that the first line of a window waits for others.

    Raises:
        OSError: reading failed. The lines before the failure were already yielded.
    """
    waiting: queue.Queue[bytes | BaseException | None] = queue.Queue(2 * size)

    def read() -> None:
        end: BaseException | None = None
        try:
            for line in lines:
                waiting.put(line)
        except Exception as error:  # raised again in the consumer's thread
            end = error
        waiting.put(end)

    threading.Thread(target=read, daemon=True).start()
    while isinstance(item := waiting.get(), bytes):
        window, last = [item], False
        until = time.monotonic() + patience
        while len(window) < size and not last:
            try:
                item = waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            last = not isinstance(item, bytes)
            if isinstance(item, bytes):
                window.append(item)
        yield window
        if last:
            break
    if isinstance(item, BaseException):
        raise item
