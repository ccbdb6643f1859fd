"""What an error while reading says: that the files are damaged, or that they could not be read now.

Only damage is a reason to go on from an older checkpoint. A file system that does not answer, a
role that may not read, a network that is down pass by, and the checkpoint is as good as before.
Processes of a job that read together also judge together: what one of them cannot read, none can.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpt_jax.checkpointing.checksums import Damaged

Value = TypeVar("Value")

_FINE, _DAMAGED, _UNREAD = range(3)  # the worst that any process met counts
# A file that a complete checkpoint should have is not there, or is something else.
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# What decoders of JSON, msgpack and trees raise of bytes that are not those that were written.
_UNDECODABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError)
# TensorStore's errors, whatever went wrong, are ValueErrors that begin with a status. These are of
# the bytes; all others are of the way to them, and UNKNOWN may be anything.
_STATUS = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
_OF_BYTES = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "INVALID_ARGUMENT", "FAILED_PRECONDITION")


def is_corruption(error: BaseException) -> bool:
    """Whether an error can only be of files that are damaged, or missing where a complete
    checkpoint has them."""
    chain = list(_chain(error))
    if any(map(_is_transport_error, chain)):
        return False
    return any(isinstance(each, _MISSING + _UNDECODABLE) for each in chain)


def _is_transport_error(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, _MISSING)
    status = _STATUS.match(str(error))
    return status is not None and status[1] not in _OF_BYTES


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def reason(error: BaseException) -> str:
    """An error in one line; a store's own message goes on with a page of settings."""
    text = textwrap.shorten(str(error).partition("\n")[0], 300, placeholder=" ...")
    return f"{type(error).__name__}: {text}"


def read_on_all_processes(read: Callable[[], Value], what: str) -> Value:
    """What a function that reads gives, where it gives something in every process of the job.

    Args:
        read: must not wait for other processes.
        what: is read, for the message.

    Raises:
        Damaged: of all processes that could not read it, each found damage; raised in all.
        OSError: one could not read it for another reason; raised in all.
    """
    found, error, mine = None, None, _FINE
    try:
        found = read()
    except Exception as caught:  # noqa: BLE001 - whatever a damaged file or a store may raise
        error, mine = caught, _DAMAGED if is_corruption(caught) else _UNREAD
    worst = _worst(mine)
    if worst == _FINE:
        return found  # pyright: ignore[reportReturnType] - `read` returned it
    said = "another process of this job says why" if error is None else reason(error)
    if worst == _DAMAGED:
        raise Damaged(said) from error
    raise OSError(
        f"{what} could not be read now ({said}). That does not say that it is damaged, so it stays "
        "where it is, and no older one is taken. Once it can be read, the same command goes on "
        "from it; to give it up, rename it, and the one before it is used."
    ) from error


def _worst(mine: int) -> int:
    """The highest of the processes' numbers; all of them call it."""
    if jax.process_count() == 1:
        return mine
    return int(np.max(multihost_utils.process_allgather(np.int32(mine))))
