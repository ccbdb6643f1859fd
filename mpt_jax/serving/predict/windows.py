"""Windows of input lines: those that are waiting or arrive within 20 ms, up to a limit."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator

# Seconds that a window stays open after its first line.
PATIENCE = 0.02


def windows(lines: Iterable[bytes], size: int, patience: float = PATIENCE) -> Iterator[list[bytes]]:
    """Yields lists of 1 to `size` lines, in order.

    A thread reads ahead. Windows are full if lines arrive faster than they are answered (from a
    file, say), and hold one line if somebody types them. If lines arrive steadily but slowly, a
    window closes `patience` seconds after its first line, so that line waits no longer.

    Args:
        lines: the input; may block between lines.
        size: maximum number of lines in a window; up to two windows are read ahead.
        patience: seconds that the first line of a window waits for others.

    Raises:
        OSError: any error of reading, after the lines before it were yielded.
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
