"""A file of lines that is written in parts, and resumed after a stop.

    FILE               all lines, once the file is complete
    FILE.COMPLETED     its record, as JSON
    FILE.partial       the lines so far
    FILE.partial_of    their record

A record holds what the lines are made from, the number of lines and bytes, and what the caller
adds. Lines are on disk before the record counts them, so a later start cuts the partial file to
its record, half-written lines included, and resumes there. Lines that are made from something else
are never added.

A local partial file is locked while it is written; the system releases the lock when the process
ends. A bucket has neither locks nor appends: every part uploads the partial file again, and two
runs that write the same file overwrite each other, so give each its own folder.

One process writes a file. In a job of several, one calls `begin` and tells the others its result.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from absl import logging
from etils import epath

from mpt_jax.core.comparison import differences
from mpt_jax.runtime.files import is_local, write_atomic


class Refused(ValueError):
    """A file that cannot be resumed as asked; nothing was written."""


class ResumableFile:
    """Lines to a file, resumed.

    Args:
        path: the complete file; the others are beside it.
        made_from: what the lines depend on, JSON values.
        notes: further fields of the record, with their values before the first line.
        require_lock: whether a file that cannot be locked is an error. Otherwise a warning, since
            some network file systems and all buckets have no locks.
        elsewhere: what the user can choose instead of this file, for messages.

    Attributes:
        lines: lines written, those of earlier starts included.
        notes: the further fields now.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        made_from: Mapping[str, Any],
        notes: Mapping[str, Any] | None = None,
        *,
        require_lock: bool = True,
        elsewhere: str = "another file",
    ):
        self.path = epath.Path(path)
        self._partial, self._record, self._completed = (
            self.path.with_name(f"{self.path.name}.{suffix}")
            for suffix in ("partial", "partial_of", "COMPLETED")
        )
        self._made_from = json.loads(json.dumps(dict(made_from)))
        self.notes = dict(notes or {})
        self._require_lock, self._elsewhere = require_lock, elsewhere
        self.lines = self._bytes = 0
        self._file: BinaryIO | None = None

    def is_complete(self) -> bool:
        """Returns whether nothing is left to do. Writes nothing and takes no lock.

        Raises:
            Refused: as `begin`, except for another run that writes the file.
        """
        self._check_name()
        complete = self._completed.exists()
        self._read(complete)
        if complete:
            self._check_size()
        else:
            self._check_record()
        return complete and self.path.exists()

    def begin(self, check: Callable[[bool], None] | None = None) -> int | None:
        """Locks the partial file and brings it to its record.

        Args:
            check: called before anything is changed, if there are lines; whether they are all
                lines is its argument. It may raise.

        Returns:
            The number of lines; None if the file is complete.

        Raises:
            Refused: the file was made from something else, or not by this command; a part of it
                is lost; or another run is writing it.
        """
        try:
            return self._begin(check)
        except BaseException:
            self.close()
            raise

    def _begin(self, check: Callable[[bool], None] | None) -> int | None:
        self._check_name()
        if self._partial.exists() or not self._completed.exists():
            self._take()
        # A run that held the lock until now may have completed the file.
        complete = self._completed.exists()
        if self._read(complete) and check is not None:
            check(complete)
        if complete:
            # A start that was killed before its last step left the lines under the other name.
            if self._check_size() == self._partial:
                self._partial.replace(self.path)
            self.close()
            return None
        self._resume()
        return self.lines

    def append(self, lines: Sequence[str], notes: Mapping[str, Any] | None = None) -> None:
        """Writes lines, and then counts them in the record.

        Args:
            lines: without their line ends.
            notes: new values of the record's further fields.

        Raises:
            OSError: they cannot be written; the next start cuts off what was.
        """
        content = "".join(f"{line}\n" for line in lines).encode()
        if self._file is not None:
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())
        elif content:
            with self._partial.open("ab") as file:
                file.write(content)
        self.lines += len(lines)
        self._bytes += len(content)
        self.notes |= notes or {}
        self._write_record()

    def finish(self) -> None:
        """Gives the file its name."""
        self._record.replace(self._completed)
        self._partial.replace(self.path)
        self.close()  # last, since it releases the lock

    def close(self) -> None:
        """Releases the partial file."""
        if self._file is not None:
            self._file.close()

    def _check_name(self) -> None:
        if self.path.exists() and not self._completed.exists():
            raise Refused(
                f"{self.path} exists, and is no answer of this command; choose {self._elsewhere}."
            )

    def _take(self) -> None:
        """Opens the partial file, and keeps other runs from writing it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(self.path):
            self._cannot_lock("a bucket has no locks")
            return
        self._file = open(self._partial, "ab")  # noqa: SIM115 - held until `close`
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                f"Another run is writing {self._partial}: wait for it, or choose {self._elsewhere}."
            ) from error
        except OSError as error:  # some network file systems have no locks
            self._cannot_lock(f"{error.strerror}")

    def _cannot_lock(self, why: str) -> None:
        message = f"{self._partial} cannot be locked against other runs ({why})"
        if self._require_lock:
            raise Refused(f"{message}: choose a file on another file system.")
        logging.warning("%s: make sure that no other run writes it.", message)

    def _read(self, complete: bool) -> bool:
        """Reads the record; returns whether it counts any lines, or all."""
        self.lines = self._bytes = 0
        record = self._completed if complete else self._record
        if not record.exists():
            return False
        try:
            text = record.read_text()
            saved, self.lines, self._bytes, notes = self._parsed(text, complete)
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(
                f"{record} cannot be read ({error!r}). Remove {self.path}* to begin again."
            ) from error
        if not (complete or self.lines):
            return False  # nothing that could be mixed
        if found := differences(saved, self._made_from):
            raise Refused(
                f"{self.path} was made from something else ({found}). Choose {self._elsewhere}, or "
                f"remove {self.path}* to make it again."
            )
        self.notes = notes
        return True

    def _parsed(
        self, text: str, complete: bool
    ) -> tuple[Mapping[str, Any], int, int, dict[str, Any]]:
        """What a record says: made from what, lines, bytes, notes."""
        found = json.loads(text or "{}")  # T5X leaves an empty .COMPLETED
        if not isinstance(found, dict):
            raise TypeError("no JSON object")
        notes = {name: found[name] for name in self.notes}
        if "made_from" in found:
            return dict(found["made_from"]), int(found["lines"]), int(found["bytes"]), notes
        # Records of earlier versions had no counts: the lines themselves are counted.
        content = b""
        if (path := self.path if complete else self._partial).exists():
            content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        return found, content.count(b"\n"), whole, notes

    def _check_size(self) -> epath.Path:
        """Returns where the lines of a complete file are.

        Raises:
            Refused: they are not as long as the record says.
        """
        unnamed = not self.path.exists() and self._partial.exists()
        file = self._partial if unnamed else self.path
        size = _size(file)
        if not file.exists() or size != self._bytes:
            found = f"has {size} bytes" if file.exists() else "is gone"
            raise Refused(
                f"{file} {found}, and {self._completed} records {self._bytes} bytes. Put the file "
                f"back as it was, or remove {self.path}* to make it again."
            )
        return file

    def _check_record(self) -> None:
        """Raises Refused if the partial file has lines that its record does not explain."""
        size = _size(self._partial)
        if size and not self._record.exists():
            raise Refused(
                f"{self._partial} has {size} bytes and no {self._record.name} beside it, so "
                f"nothing says what they answer. Remove {self._partial} to begin again."
            )
        if size < self._bytes:
            raise Refused(
                f"{self._partial} has {size} bytes, and its record says {self._bytes}: a part "
                f"of it is lost. Remove {self.path}.* to begin again."
            )

    def _resume(self) -> None:
        """Cuts the partial file to its record; begins both if there is none."""
        self._check_record()
        self._write_record()
        if self._file is not None:
            self._file.truncate(self._bytes)
        elif not self._partial.exists() or _size(self._partial) > self._bytes:
            kept = self._partial.read_bytes()[: self._bytes] if self._bytes else b""
            write_atomic(self._partial, kept)

    def _write_record(self) -> None:
        record = {
            "made_from": self._made_from,
            "lines": self.lines,
            "bytes": self._bytes,
            **self.notes,
        }
        write_atomic(self._record, json.dumps(record, indent=2) + "\n")


def _size(path: epath.Path) -> int:
    return path.stat().length if path.exists() else 0
