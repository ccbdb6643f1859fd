"""Stopping on request: SIGTERM (a preempted machine) and Ctrl-C save first, then exit.

A scheduler can tell the two from failures by the exit code and start the same command again: it
resumes from the save.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: nothing is wrong, try again.
RETRY_EXIT_CODE = 75
INTERRUPT_EXIT_CODE = 130


class StopRequest:
    """Whether somebody asked this run to stop."""

    def __init__(self):
        self.signal: int | None = None

    @property
    def exit_code(self) -> int:
        """What the process should exit with."""
        return INTERRUPT_EXIT_CODE if self.signal == signal.SIGINT else RETRY_EXIT_CODE

    def is_due(self, step: int) -> bool:
        """Whether all processes should stop after this step; they agree on the step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
        return self.signal is not None

    def _receive(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the save
        self.signal = number


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listens for SIGTERM and SIGINT while the block runs.

    With several processes JAX's own notifier has SIGTERM, and all processes hear of it at one
    step; Ctrl-C, which reaches one of them, ends that one at once. Outside the main thread
    signals cannot be caught, and only that notifier is heard.
    """
    request = StopRequest()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if jax.process_count() > 1 or not in_main_thread:
        yield request
        return
    wanted = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request._receive) for number in wanted}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
