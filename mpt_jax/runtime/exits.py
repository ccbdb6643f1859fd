"""Exit of a command: with a message for an error, silently if nobody reads its output."""

from __future__ import annotations

import os
import select
import sys
from typing import BinaryIO, NoReturn, TextIO


def exit_with(prog: str, error: Exception, text: str | None = None) -> NoReturn:
    """Prints an error after the name of the command, and exits with code 2.

    Args:
        prog: the command, for example `mpt-jax tasks`.
        error: the error. If the reader of standard output is gone, `exit_if_unread` exits silently.
        text: the text to print; defaults to that of the error.
    """
    exit_if_unread(error)
    print(f"{prog}: {error if text is None else text}", file=sys.stderr)
    sys.exit(2)


def exit_if_unread(error: Exception) -> None:
    """Exits with code 0 if an error means that the reader of standard output is gone, as in
    `mpt-jax tasks list | head`."""
    if not isinstance(error, BrokenPipeError):
        return
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if poll.poll(0):  # with no event requested, only POLLERR and POLLHUP are reported
        silence(sys.stdout)
        sys.exit(0)


def silence(stream: TextIO | BinaryIO) -> None:
    """Discards the buffered and all later output of a stream whose reader is gone. Otherwise Python
    would write it at exit, fail again, and change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
