"""Lines as they arrive: as many as are waiting or come within 20 ms, up to a window."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator

# Seconds after the first line of a window in which further ones may come.
PATIENCE = 0.02


def windows(lines: Iterable[bytes], size: int, patience: float = PATIENCE) -> Iterator[list[bytes]]:
    """Lists of 1 to `size` lines, in order.

    A thread reads ahead, so a window is whole where lines come faster than they are answered (from
    a file, say), and one line where somebody types them. Of lines that come steadily but slowly a
    window has those of its first moments: its first line waits no longer than that.

    Args:
        lines: may block between lines.
        size: lines of a window at most; up to two windows are read ahead.
        patience: seconds that the first line of a window waits for others.

    Raises:
        OSError: whatever reading raised, after the lines before it.
    """
    waiting: queue.Queue[bytes | BaseException | None] = queue.Queue(2 * size)

    def read() -> None:
        end: BaseException | None = None
        try:
            for line in lines:
                waiting.put(line)
        except Exception as error:  # raised again where the lines are taken
            end = error
        waiting.put(end)

    threading.Thread(target=read, daemon=True).start()
    while isinstance(found := waiting.get(), bytes):
        window, last = [found], False
        until = time.monotonic() + patience
        while len(window) < size and not last:
            try:
                found = waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            last = not isinstance(found, bytes)
            if isinstance(found, bytes):
                window.append(found)
        yield window
        if last:
            break
    if isinstance(found, BaseException):
        raise found
