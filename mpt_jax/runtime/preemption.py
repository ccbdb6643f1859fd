"""Stopping on request: SIGTERM (a preempted machine) and Ctrl-C save first, then exit.

A scheduler can tell the two from failures by the exit code and start the same command again: it
resumes from the save. So it is with a process whose peers have died, which cannot save any more.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from absl import logging
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: nothing is wrong, try again.
RETRY_EXIT_CODE = 75
INTERRUPT_EXIT_CODE = 130

# What JAX's errors begin with where the program, its compiler or the memory is at fault: the same
# command would end in the same way.
_OURS = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED")
# And what those say that tell of another process: the status alone of the distributed service and
# of TPUs' networks; Gloo, which CPUs use, reports lost connections as INTERNAL.
_PEERS = re.compile(
    r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELED)\b|heartbeat|coordination service|"
    r"distributed service|another task died|preempted|connection (reset|closed|refused|timed out)|"
    r"socket closed|broken pipe|connectfullmesh|gloo.*(timed out|timeout)",
    re.IGNORECASE | re.DOTALL,
)


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


def is_peer_failure(error: Exception) -> bool:
    """Whether an error of JAX's runtime says that another process of the job is lost."""
    said = str(error)
    return not said.startswith(_OURS) and _PEERS.search(said) is not None


def exit_if_peer_lost(error: Exception) -> None:
    """Ends this process with the code for "start me again" where it has lost another one of its
    job; returns where the error is one that would come again, which its caller raises.

    An orderly exit would wait for the dead. JAX's own watch ends a process whose peers are silent
    (`--heartbeat_timeout`), which is what happens where no computation fails, but all wait.
    """
    if jax.process_count() == 1 or not is_peer_failure(error):
        return
    logging.error(
        "A computation across the %d processes of this job failed (%s). Most likely one of them "
        "has ended: its log says why. The same command, started on all of them again, goes on from "
        "the last checkpoint.",
        jax.process_count(),
        re.sub(r"(Error dispatching computation: )+", "", str(error).partition("\n")[0]),
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(RETRY_EXIT_CODE)
