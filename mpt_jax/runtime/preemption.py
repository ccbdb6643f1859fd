"""Graceful stop: on SIGTERM (a preempted machine) or Ctrl-C, a job saves and then exits.

The exit code distinguishes a stop from a failure, so a scheduler can start the same command again,
which resumes from the saved checkpoint. A process that has lost other processes of its job can no
longer save, but exits with the same code as after SIGTERM.
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

# Prefixes of JAX errors caused by the program, its compiler or its memory: the same command would
# fail again.
_OWN_FAILURE = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED")
# Matches JAX errors caused by another process. The status is enough for the distributed service and
# TPU networks. Gloo, which CPUs use, reports lost connections as INTERNAL.
_PEER_FAILURE = re.compile(
    r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELED)\b|heartbeat|coordination service|"
    r"distributed service|another task died|preempted|connection (reset|closed|refused|timed out)|"
    r"socket closed|broken pipe|connectfullmesh|gloo.*(timed out|timeout)",
    re.IGNORECASE | re.DOTALL,
)


class StopRequest:
    """A request to stop this job.

    Attributes:
        signal: the signal that requested the stop, or None if the job should continue.
    """

    def __init__(self):
        self.signal: int | None = None

    @property
    def exit_code(self) -> int:
        """Exit code of the process: 130 after Ctrl-C, else 75."""
        return INTERRUPT_EXIT_CODE if self.signal == signal.SIGINT else RETRY_EXIT_CODE

    def is_due(self, step: int) -> bool:
        """Whether all processes should stop after this step; all get the same answer."""
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

    With several processes, JAX's own notifier handles SIGTERM and reports it to all processes at
    the same step; Ctrl-C ends only the process that it reaches, without a save. A single process
    can catch signals only in its main thread; elsewhere they keep their usual effect.
    """
    request = StopRequest()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if jax.process_count() > 1 or not in_main_thread:
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request._receive) for number in signals}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_peer_failure(error: Exception) -> bool:
    """Whether an error of JAX's runtime means that another process of the job was lost."""
    message = str(error)
    return not message.startswith(_OWN_FAILURE) and _PEER_FAILURE.search(message) is not None


def exit_if_peer_lost(error: Exception) -> None:
    """Exits with RETRY_EXIT_CODE if the error means that another process of the job was lost.

    Otherwise returns, so that the caller can raise the error. Exits immediately, because a normal
    exit would wait for the lost process. If all processes wait, so that no computation fails, JAX's
    watchdog ends a process that no longer hears from the others (`--heartbeat_timeout`).
    """
    if jax.process_count() == 1 or not is_peer_failure(error):
        return
    logging.error(
        "A computation across the %d processes of this job failed (%s). Most likely, another "
        "process has ended; its log shows why. Rerun the same command in all processes to resume "
        "from the last checkpoint.",
        jax.process_count(),
        re.sub(r"(Error dispatching computation: )+", "", str(error).partition("\n")[0]),
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(RETRY_EXIT_CODE)
