"""Windows of lines: full if lines are waiting, and yielded at once if they are not."""

from __future__ import annotations

import threading
import time

import pytest

from mpt_jax.serving.predict.windows import windows


def test_windows_waiting_lines_fill_windows():
    lines = [b"%d\n" % i for i in range(10)]
    assert list(windows(lines, 4, patience=5.0)) == [lines[:4], lines[4:8], lines[8:]]
    assert list(windows([], 4)) == []


def test_windows_typed_line_is_yielded_at_once():
    asked = [threading.Event() for _ in range(3)]

    def typed():
        for i, event in enumerate(asked):
            assert event.wait(10), "the line before was not answered"
            yield b"%d" % i

    found = []
    asked[0].set()
    for window in windows(typed(), 4):
        found += window
        if len(found) < len(asked):
            asked[len(found)].set()
    assert found == [b"0", b"1", b"2"]


def test_windows_steady_lines_do_not_delay_first_line():
    def steady():
        for i in range(20):
            yield b"%d" % i
            time.sleep(0.05)

    first, *others = windows(steady(), 100, patience=0.2)
    assert len(first) < 10
    assert [*first, *(line for window in others for line in window)] == [
        b"%d" % i for i in range(20)
    ]


def test_windows_zero_patience_takes_waiting_lines():
    lines = [b"%d" % i for i in range(10)]
    found = windows(lines, 5, patience=0.0)
    assert next(found)
    time.sleep(0.2)  # as long as an answer takes; the thread keeps reading
    assert len(next(found)) == 5


def test_windows_read_error_comes_after_earlier_lines():
    def broken():
        yield b"a"
        raise OSError("the disk is gone")

    found = windows(broken(), 4, patience=5.0)
    assert next(found) == [b"a"]
    with pytest.raises(OSError, match="disk is gone"):
        next(found)
