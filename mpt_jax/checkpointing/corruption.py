"""Classification of read errors: corrupt files, or files that cannot be read at the moment.

Only corruption is a reason to resume from an older checkpoint. An unresponsive file system, missing
permissions or a network outage are temporary, and the checkpoint may be intact. The processes of a
job decide together: if one of them cannot read a checkpoint, none uses it.
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

_FINE, _DAMAGED, _UNREAD = range(3)  # the highest status of all processes counts
# A file of a complete checkpoint is missing, or a folder is in its place (or the other way round).
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# What decoders of JSON, msgpack and trees raise for corrupt bytes.
_UNDECODABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    ArithmeticError,
    AssertionError,
    RecursionError,
)
# TensorStore raises a ValueError that begins with a status, whatever went wrong. These statuses
# concern the bytes. All others concern access to them, and UNKNOWN may be anything.
_STATUS = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
_OF_BYTES = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "INVALID_ARGUMENT", "FAILED_PRECONDITION")


def is_corruption(error: BaseException) -> bool:
    """Whether an error can only be caused by corrupt or missing files of a checkpoint."""
    chain = list(_chain(error))
    if any(map(_is_transport_error, chain)):
        return False
    return any(isinstance(cause, _MISSING + _UNDECODABLE) for cause in chain)


def _is_transport_error(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, _MISSING)
    status = _STATUS.match(str(error))
    return status is not None and status[1] not in _OF_BYTES


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def reason(error: BaseException) -> str:
    """Describes an error in one line, without a final period, to show in parentheses.

    Keeps only the first line, since array stores may append a page of settings.
    """
    first_line = str(error).partition("\n")[0].removesuffix(".")
    text = textwrap.shorten(first_line, 300, placeholder=" ...")
    return f"{type(error).__name__}: {text}"


def read_on_all_processes(read: Callable[[], Value], what: str) -> Value:
    """Returns the result of `read`, if it succeeds in every process of the job.

    Args:
        read: a function that does not wait for other processes.
        what: the path of the checkpoint; the subject of the error's first sentence.

    Raises:
        Damaged: in some processes `read` failed because of corruption, and in none for another
            reason; raised in all processes.
        OSError: in some process `read` failed for another reason; raised in all processes.
    """
    value, error, status = None, None, _FINE
    try:
        value = read()
    except Exception as caught:  # noqa: BLE001 - whatever a damaged file or a store may raise
        error, status = caught, _DAMAGED if is_corruption(caught) else _UNREAD
    worst = _worst(status)
    if worst == _FINE:
        return value  # pyright: ignore[reportReturnType] - `read` returned it
    cause = "another process of this job failed; see its log" if error is None else reason(error)
    if worst == _DAMAGED:
        raise Damaged(cause) from error
    raise OSError(
        f"{what} could not be read now ({cause}). The checkpoint may still be intact, so it was "
        "kept and no older one was used. Run the same command again once the checkpoint can be "
        "read. To resume training from the previous one instead, rename this checkpoint."
    ) from error


def _worst(status: int) -> int:
    """Returns the highest status of all processes; all must call it together."""
    if jax.process_count() == 1:
        return status
    return int(np.max(multihost_utils.process_allgather(np.int32(status))))
