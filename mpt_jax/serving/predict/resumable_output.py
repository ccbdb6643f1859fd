"""Where answers go: standard output, or a file that goes on where an earlier start left off.

    FILE               all answers, when all are there
    FILE.COMPLETED     what they were made from, as JSON
    FILE.partial       the answers so far
    FILE.partial_of    what they are made from, how many they are, and a digest of their requests

A later start truncates the partial file to what its record says, reads as many requests, compares
their digest, and goes on. So a start that was killed while it wrote leaves nothing behind, and
answers are never mixed with those of other requests, prompts or settings. Whoever writes holds a
lock on the partial file, which the system releases when its process ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mpt_jax.core.comparison import differences
from mpt_jax.runtime.files import write_atomic
from mpt_jax.serving.predict.progress import silence


class Refused(ValueError):
    """A file that cannot go on with these requests; nothing was written."""


class Stream:
    """Answers to a stream, at once.

    Attributes:
        lines: requests that were answered.
        failed: those of them that could not be, whose answer is an error.
    """

    def __init__(self, stream: BinaryIO):
        self.lines = self.failed = 0
        self._stream = stream

    def begin(self, lines: Iterator[bytes]) -> int | None:
        """0: no requests are answered already."""
        return 0

    def write(self, lines: Sequence[bytes], answers: Sequence[Mapping[str, Any]]) -> None:
        """Writes the answers to some requests."""
        try:
            self._stream.write(_encoded(answers))
            self._stream.flush()
        except OSError:
            silence(self._stream)
            raise
        self.lines += len(lines)
        self.failed += _failed(answers)

    def finish(self) -> None:
        """Nothing: a stream ends when its process does."""

    def close(self) -> None:
        """Nothing: the stream is somebody else's."""


class File:
    """Answers to a file, resumed.

    Args:
        path: of the file; others lie beside it.
        made_from: what answers depend on beside the requests; JSON values.

    Attributes:
        lines, failed: as in `Stream`, those of earlier starts among them.
    """

    def __init__(self, path: str | os.PathLike[str], made_from: Mapping[str, Any]):
        self.path = Path(path)
        self._partial, self._record, self._completed = (
            self.path.with_name(f"{self.path.name}.{suffix}")
            for suffix in ("partial", "partial_of", "COMPLETED")
        )
        self._made_from = dict(made_from)
        self.lines = self.failed = self._bytes = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None

    def begin(self, lines: Iterator[bytes]) -> int | None:
        """Takes the requests that are answered already off `lines`.

        Returns:
            their number; None where the file is whole.

        Raises:
            Refused: the file was made from something else, from other requests, or not by this
                command; a part of it is lost; or another run is writing it.
        """
        try:
            return self._begin(lines)
        except BaseException:
            self.close()
            raise

    def _begin(self, lines: Iterator[bytes]) -> int | None:
        if self.path.exists() and not self._completed.exists():
            raise Refused(f"{self.path} exists, and is no answer of this command; choose another.")
        if self._partial.exists() or not self._completed.exists():
            self._take()
        # A run that held the lock until now may have finished meanwhile.
        whole = self._completed.exists()
        if whole or self._record.exists():
            self._read(self._completed if whole else self._record)
            self._skip(lines)
        if whole:
            self._check_whole(lines)
            return None
        self._go_on()
        return self.lines

    def _take(self) -> None:
        """Opens the partial file, and keeps other runs from writing it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                f"Another run is writing {self._partial}: wait for it, or choose another file."
            ) from error
        except OSError as error:  # some network file systems have no locks
            raise Refused(
                f"{self._partial} cannot be locked against other runs ({error.strerror}): choose a "
                "file on another file system."
            ) from error

    def _check_whole(self, lines: Iterator[bytes]) -> None:
        if next(lines, None) is not None:
            raise Refused(
                f"{self.path} answers {self.lines} requests, and there are more by now. "
                f"Choose another file, or remove {self.path}* to answer all of them again."
            )
        # A start that was killed before its last step left the answers under their other name.
        unnamed = not self.path.exists() and self._partial.exists()
        file = self._partial if unnamed else self.path
        size = file.stat().st_size if file.exists() else 0
        if not file.exists() or size != self._bytes:
            found = f"has {size} bytes" if file.exists() else "is gone"
            raise Refused(
                f"{file} {found}, and {self._completed} tells of {self._bytes} bytes. Put the file "
                f"back as it was, or remove {self.path}* to answer all requests again."
            )
        if unnamed:
            file.replace(self.path)
        self.close()

    def _go_on(self) -> None:
        """Brings the partial file to where its record stands; begins both where there is none."""
        assert self._file is not None, "it was taken"
        size = os.fstat(self._file.fileno()).st_size
        if size and not self._record.exists():
            raise Refused(
                f"{self._partial} has {size} bytes and no {self._record.name} beside it, so "
                f"nothing says what they answer. Remove {self._partial} to begin again."
            )
        if size < self._bytes:
            raise Refused(
                f"{self._partial} has {size} bytes, and its record tells of {self._bytes}: a part "
                f"of it is lost. Remove {self.path}.* to begin again."
            )
        self._write_record()
        self._file.truncate(self._bytes)

    def write(self, lines: Sequence[bytes], answers: Sequence[Mapping[str, Any]]) -> None:
        """Appends the answers to some requests, and then says so in the record."""
        assert self._file is not None, "begin comes first"
        made = _encoded(answers)
        self._file.write(made)
        self._file.flush()
        os.fsync(self._file.fileno())
        for line in lines:
            self._digest.update(line)
        self.lines += len(lines)
        self.failed += _failed(answers)
        self._bytes += len(made)
        self._write_record()

    def finish(self) -> None:
        """Gives the file its name."""
        self._record.replace(self._completed)
        self._partial.replace(self.path)
        self.close()  # last, since it releases the lock

    def close(self) -> None:
        """Lets go of the partial file."""
        if self._file is not None:
            self._file.close()

    def _read(self, record: Path) -> None:
        try:
            found = json.loads(record.read_text())
            self.lines, self.failed, self._bytes = found["lines"], found["failed"], found["bytes"]
            self._expected, saved = found["requests_sha256"], found["made_from"]
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(
                f"{record} cannot be read ({error!r}). Remove {self.path}* to begin again."
            ) from error
        ours = json.loads(json.dumps(self._made_from))
        if differing := differences(saved, ours):
            raise Refused(
                f"{self.path} was made from something else ({differing}). Choose another file, or "
                f"remove {self.path}* to make it again."
            )

    def _skip(self, lines: Iterator[bytes]) -> None:
        for _ in range(self.lines):
            self._digest.update(next(lines, b""))
        if self._digest.hexdigest() != self._expected:
            raise Refused(
                f"{self.path} answers other requests: the first {self.lines} lines of the input "
                f"are not those it was begun with. Choose another file, or remove {self.path}*."
            )

    def _write_record(self) -> None:
        record = {
            "made_from": self._made_from,
            "lines": self.lines,
            "failed": self.failed,
            "bytes": self._bytes,
            "requests_sha256": self._digest.hexdigest(),
        }
        write_atomic(self._record, json.dumps(record, indent=2) + "\n")


Output = Stream | File


def _failed(answers: Sequence[Mapping[str, Any]]) -> int:
    return sum("error" in answer for answer in answers)


def _encoded(answers: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(answer) + "\n" for answer in answers).encode()
