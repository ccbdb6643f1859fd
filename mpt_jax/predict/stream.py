"""Lines as they arrive: as many as are waiting, up to a window, and never waiting for more."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator

# Seconds without a line after which what has come is answered.
PATIENCE = 0.02


def windows(lines: Iterable[bytes], size: int, patience: float = PATIENCE) -> Iterator[list[bytes]]:
    """Lists of 1 to `size` lines, in order.

    A thread reads ahead, so a window is whole where lines come faster than they are answered (from
    a file, say), and one line where somebody types them.

    Args:
        lines: may block between lines.
        size: lines of a window at most; up to two windows are read ahead.
        patience: seconds to wait for a further line.

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
        while len(window) < size and not last:
            try:
                found = waiting.get(timeout=patience)
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
