"""Windows of lines: whole where lines are there, at once where they are not."""

from __future__ import annotations

import threading
import time

import pytest

from mpt_jax.serving.predict.windows import windows


def test_lines_that_are_there_come_in_whole_windows():
    lines = [b"%d\n" % i for i in range(10)]
    assert list(windows(lines, 4, patience=5.0)) == [lines[:4], lines[4:8], lines[8:]]
    assert list(windows([], 4)) == []


def test_a_line_is_not_kept_until_the_next_one_comes():
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


def test_lines_that_come_steadily_do_not_keep_the_first_waiting():
    def steady():
        for i in range(20):
            yield b"%d" % i
            time.sleep(0.05)

    first, *others = windows(steady(), 100, patience=0.2)
    assert len(first) < 10
    assert [*first, *(line for window in others for line in window)] == [
        b"%d" % i for i in range(20)
    ]


def test_lines_that_wait_are_taken_however_late_it_is():
    lines = [b"%d" % i for i in range(10)]
    found = windows(lines, 5, patience=0.0)
    assert next(found)
    time.sleep(0.2)  # as an answer takes; the thread reads on
    assert len(next(found)) == 5


def test_an_error_of_reading_comes_after_the_lines_before_it():
    def broken():
        yield b"a"
        raise OSError("the disk is gone")

    found = windows(broken(), 4, patience=5.0)
    assert next(found) == [b"a"]
    with pytest.raises(OSError, match="disk is gone"):
        next(found)
