"""Output of answers: standard output, or a file that is resumed after an interruption.

The record of a file has a digest of the answered requests. To resume, the command reads the same
number of requests and compares their digest. So a file never mixes answers to different requests,
or answers from different prompts or settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from mpt_jax.runtime.exits import silence
from mpt_jax.runtime.resumable_output import Refused, ResumableFile

_UNWRITABLE = re.compile(r"[\ud800-\udfff\x85\u2028\u2029]")


class Stream:
    """Output of answers to a stream, which is flushed after each write.

    Attributes:
        lines: the number of answered requests.
        failed: the number of requests whose answer is an error.
    """

    def __init__(self, stream: BinaryIO):
        self.lines = self.failed = 0
        self._stream = stream

    def begin(self, lines: Iterator[bytes]) -> int | None:
        """Returns 0, since no requests have been answered."""
        return 0

    def write(self, lines: Sequence[bytes], answers: Sequence[Mapping[str, Any]]) -> None:
        """Writes the answers to some requests."""
        try:
            self._stream.write("".join(f"{_line(answer)}\n" for answer in answers).encode())
            self._stream.flush()
        except OSError:
            silence(self._stream)
            raise
        self.lines += len(lines)
        self.failed += _failed(answers)

    def finish(self) -> None:
        """Does nothing: a stream ends with its process."""

    def close(self) -> None:
        """Does nothing: the caller owns the stream."""


class File:
    """Output of answers to a file, resumed if it is incomplete.

    Args:
        path: the file. Its record is written beside it (`runtime.resumable_output`).
        made_from: what the answers depend on besides the requests, as JSON values.
        optional: the names in `made_from` that earlier versions do not record.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        made_from: Mapping[str, Any],
        optional: Collection[str] = (),
    ):
        self._digest = hashlib.sha256()
        notes = {"failed": 0, "requests_sha256": self._digest.hexdigest()}
        self._output = ResumableFile(path, made_from, notes, optional=optional)

    @property
    def lines(self) -> int:
        """Number of answered requests, including those of earlier starts."""
        return self._output.lines

    @property
    def failed(self) -> int:
        """Number of answered requests whose answer is an error."""
        return self._output.notes["failed"]

    def begin(self, lines: Iterator[bytes]) -> int | None:
        """Skips the requests in `lines` that are already answered.

        Returns:
            The number of skipped requests; None if the file is complete.

        Raises:
            Refused: as in `ResumableFile.begin`, or the file has answers to other requests.
        """
        return self._output.begin(lambda complete: self._skip(lines, complete))

    def _skip(self, lines: Iterator[bytes], complete: bool) -> None:
        path = self._output.path
        for _ in range(self.lines):
            self._digest.update(next(lines, b""))
        if self._digest.hexdigest() != self._output.notes["requests_sha256"]:
            raise Refused(
                f"{path} has answers to other requests: the first {self.lines} lines of the input "
                "differ from those that were answered. Restore the original input to resume, or "
                "set --output to another file."
            )
        if complete and next(lines, None) is not None:
            raise Refused(
                f"{path} is complete with {self.lines} requests, but the input now has more. Set "
                "--output to another file to answer all of them."
            )

    def write(self, lines: Sequence[bytes], answers: Sequence[Mapping[str, Any]]) -> None:
        """Appends the answers to some requests."""
        for line in lines:
            self._digest.update(line)
        notes = {
            "failed": self.failed + _failed(answers),
            "requests_sha256": self._digest.hexdigest(),
        }
        self._output.append([_line(answer) for answer in answers], notes)

    def finish(self) -> None:
        """Renames the file to its final name."""
        self._output.finish()

    def close(self) -> None:
        """Releases the file."""
        self._output.close()


Output = Stream | File


def _line(answer: Mapping[str, Any]) -> str:
    """Returns an answer as a line of JSON, in which most non-ASCII text is not escaped.

    Escaped are halves of surrogate pairs, which UTF-8 cannot encode, and Unicode's line separators,
    at which some readers split lines.
    """
    line = json.dumps(answer, ensure_ascii=False, allow_nan=False)  # NaN is not JSON
    return line if line.isascii() else _UNWRITABLE.sub(lambda x: f"\\u{ord(x[0]):04x}", line)


def _failed(answers: Sequence[Mapping[str, Any]]) -> int:
    return sum("error" in answer for answer in answers)
