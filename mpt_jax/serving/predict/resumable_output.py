"""Output of answers: standard output, or a file that a later start resumes.

A file's record has a digest of the answered requests. A later start reads the same number of
requests and compares their digest, so a file never mixes answers to different requests, or from
different prompts or settings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from mpt_jax.runtime.resumable_output import Refused, ResumableFile
from mpt_jax.serving.predict.progress import silence


class Stream:
    """Output of answers to a stream, without delay.

    Attributes:
        lines: number of answered requests.
        failed: number of those whose answer is an error.
    """

    def __init__(self, stream: BinaryIO):
        self.lines = self.failed = 0
        self._stream = stream

    def begin(self, lines: Iterator[bytes]) -> int | None:
        """Returns 0: no requests have been answered."""
        return 0

    def write(self, lines: Sequence[bytes], answers: Sequence[Mapping[str, Any]]) -> None:
        """Writes the answers to some requests."""
        try:
            self._stream.write("".join(f"{json.dumps(answer)}\n" for answer in answers).encode())
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
        path: the file; its record is beside it (`runtime.resumable_output`).
        made_from: what answers depend on besides the requests; JSON values.
    """

    def __init__(self, path: str | os.PathLike[str], made_from: Mapping[str, Any]):
        self._digest = hashlib.sha256()
        notes = {"failed": 0, "requests_sha256": self._digest.hexdigest()}
        self._output = ResumableFile(path, made_from, notes)

    @property
    def lines(self) -> int:
        """Number of answered requests, including those of earlier starts."""
        return self._output.lines

    @property
    def failed(self) -> int:
        """Number of answered requests whose answer is an error."""
        return self._output.notes["failed"]

    def begin(self, lines: Iterator[bytes]) -> int | None:
        """Consumes from `lines` the requests that are already answered.

        Returns:
            their number; None if the file is complete.

        Raises:
            Refused: as in `ResumableFile.begin`, or the file answers other requests.
        """
        return self._output.begin(lambda complete: self._skip(lines, complete))

    def _skip(self, lines: Iterator[bytes], complete: bool) -> None:
        path = self._output.path
        for _ in range(self.lines):
            self._digest.update(next(lines, b""))
        if self._digest.hexdigest() != self._output.notes["requests_sha256"]:
            raise Refused(
                f"{path} answers other requests: the first {self.lines} lines of the input "
                f"are not those that it answered. Choose another file, or remove {path}*."
            )
        if complete and next(lines, None) is not None:
            raise Refused(
                f"{path} is complete with {self.lines} requests, but the input now has more. "
                f"Choose another file, or remove {path}* to answer all of them again."
            )

    def write(self, lines: Sequence[bytes], answers: Sequence[Mapping[str, Any]]) -> None:
        """Appends the answers to some requests."""
        for line in lines:
            self._digest.update(line)
        notes = {
            "failed": self.failed + _failed(answers),
            "requests_sha256": self._digest.hexdigest(),
        }
        self._output.append([json.dumps(answer) for answer in answers], notes)

    def finish(self) -> None:
        """Renames the file to its final name."""
        self._output.finish()

    def close(self) -> None:
        """Releases the file."""
        self._output.close()


Output = Stream | File


def _failed(answers: Sequence[Mapping[str, Any]]) -> int:
    return sum("error" in answer for answer in answers)
