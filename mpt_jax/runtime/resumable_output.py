"""Text file that is written in parts and resumed after an interruption.

    FILE               all lines, once the file is complete
    FILE.COMPLETED     its record, as JSON
    FILE.partial       the lines so far
    FILE.partial_of    their record

A record holds the inputs that the lines were made from, the number of lines and bytes, and fields
that the caller adds. Lines are on disk before the record counts them. A later start truncates the
partial file to the recorded size, which removes half-written lines, and resumes from there. Lines
made from different inputs are never mixed.

A local partial file is locked while it is written; the system releases the lock when the process
ends. A bucket has neither locks nor appends: every part uploads the partial file again, and two
commands that write the same file overwrite each other's lines, so give each a separate folder.

Only one process writes a file. In a job of several processes, one calls `begin` and sends the
result to the others.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, BinaryIO

import msgspec
from absl import logging
from etils import epath

from mpt_jax.core import schema
from mpt_jax.core.comparison import differences
from mpt_jax.runtime.files import is_local, write_atomic

SEAL = "record_sha256"  # the digest of the other fields of a record


class Counts(msgspec.Struct):
    """The schema of a record, except the fields that the caller adds."""

    made_from: dict[str, Any]
    lines: schema.Amount
    bytes: schema.Amount


class Refused(ValueError):
    """The file cannot be resumed as requested; nothing was written."""


class ResumableFile:
    """A file of lines that can be resumed.

    Args:
        path: the complete file; the others are written beside it.
        made_from: the inputs and settings that the lines depend on, as JSON values.
        notes: the fields that the caller adds to the record, with their initial values.
        require_lock: whether a file that cannot be locked is an error. Otherwise it is a warning,
            since some network file systems and all buckets have no locks.
        optional: the names in `made_from` that are not compared if they are absent or null in the
            record or in `made_from`.
        elsewhere: what the user can choose instead of this file, to complete "Choose ..." in
            errors.

    Attributes:
        lines: number of lines written, including those of earlier starts.
        notes: the current values of the fields that the caller adds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        made_from: Mapping[str, Any],
        notes: Mapping[str, Any] | None = None,
        *,
        require_lock: bool = True,
        optional: Collection[str] = (),
        elsewhere: str = "another file",
    ):
        self.path = epath.Path(path)
        self._partial, self._record, self._completed = (
            self.path.with_name(f"{self.path.name}.{suffix}")
            for suffix in ("partial", "partial_of", "COMPLETED")
        )
        self._made_from = json.loads(json.dumps(dict(made_from)))
        self.notes = dict(notes or {})
        self._require_lock, self._optional, self._elsewhere = require_lock, optional, elsewhere
        self.lines = self._bytes = 0
        self._file: BinaryIO | None = None

    def is_complete(self) -> bool:
        """Whether the file is complete. Writes nothing and takes no lock.

        Raises:
            Refused: for the reasons given in `begin`, except that another process is writing it.
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
        """Locks the partial file and truncates it to its recorded size. If the file is complete,
        only finishes a rename that was interrupted.

        Args:
            check: called before any line is changed, if there are lines or the file is complete.
                Its argument is whether the file is complete. It may raise.

        Returns:
            The number of lines; None if the file is complete.

        Raises:
            Refused: the file was made from other inputs, or not by this command; part of it is
                missing; its record cannot be read; or another process is writing it.
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
        # A process that held the lock until now may have completed the file.
        complete = self._completed.exists()
        if self._read(complete) and check is not None:
            check(complete)
        if complete:
            # A process that was killed before its last rename left the lines in the partial file.
            if self._check_size() == self._partial:
                self._partial.replace(self.path)
            self.close()
            return None
        self._resume()
        return self.lines

    def append(self, lines: Sequence[str], notes: Mapping[str, Any] | None = None) -> None:
        """Appends lines, then counts them in the record.

        Args:
            lines: the lines, without line ends.
            notes: new values of the fields that the caller adds to the record.

        Raises:
            OSError: the lines cannot be written; the next start removes any that were written.
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
        """Renames the complete file and its record to their final names."""
        self._record.replace(self._completed)
        self._partial.replace(self.path)
        self.close()  # last, since it releases the lock

    def close(self) -> None:
        """Closes the partial file and releases its lock."""
        if self._file is not None:
            self._file.close()

    def _check_name(self) -> None:
        if self.path.exists() and not self._completed.exists():
            raise Refused(
                f"{self.path} exists and was not written by this command. Choose {self._elsewhere}."
            )

    def _take(self) -> None:
        """Opens and locks the partial file; raises Refused if another process holds the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(self.path):
            self._cannot_lock("buckets have no locks")
            return
        self._file = open(self._partial, "ab")  # noqa: SIM115 - held until `close`
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                f"Another process is writing {self._partial}. Wait for it to finish, or choose "
                f"{self._elsewhere}."
            ) from error
        except OSError as error:  # some network file systems have no locks
            self._cannot_lock(f"{error.strerror}")

    def _cannot_lock(self, why: str) -> None:
        message = f"{self._partial} cannot be locked against other processes ({why})"
        if self._require_lock:
            raise Refused(
                f"{message}. Choose a file on a file system with locks, such as a local disk."
            )
        logging.warning("%s. Make sure that no other process writes it.", message)

    def _read(self, complete: bool) -> bool:
        """Reads the record; returns whether it counts any lines or the file is complete."""
        self.lines = self._bytes = 0
        record = self._completed if complete else self._record
        if not record.exists():
            return False
        try:
            text = record.read_text()
            saved, self.lines, self._bytes, notes = self._parsed(text, complete)
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(
                f"{record} cannot be read ({schema.reason(error)}). Restore it from a copy, choose "
                f"{self._elsewhere}, or remove {self.path}* to start again."
            ) from error
        if not (complete or self.lines):
            return False  # no lines that new ones could be mixed with
        unknown = {
            name for name in self._optional if None in (saved.get(name), self._made_from.get(name))
        }
        compared = [name for name in self._made_from if name not in unknown]
        if changes := differences(saved, self._made_from, compared):
            raise Refused(
                f"{self.path} was made from other inputs ({changes}). Choose {self._elsewhere}, or "
                f"remove {self.path}* to make it again."
            )
        self.notes = notes
        return True

    def _parsed(
        self, text: str, complete: bool
    ) -> tuple[Mapping[str, Any], int, int, dict[str, Any]]:
        """Returns the fields of a record: made_from, lines, bytes, notes."""
        # T5X leaves an empty .COMPLETED.
        record = schema.parse(text or "{}", "the record", "")
        if not isinstance(record, dict):
            raise TypeError("the record is not a JSON object")
        schema.check_seal(record, SEAL, "the record", "Undo the change")
        notes = {name: record[name] for name in self.notes}
        if "made_from" in record:
            counts = schema.check(record, Counts, "the record", "")
            return counts.made_from, counts.lines, counts.bytes, notes
        # Records of earlier versions have no counts, so the lines are counted here.
        content = b""
        if (path := self.path if complete else self._partial).exists():
            content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        return record, content.count(b"\n"), whole, notes

    def _check_size(self) -> epath.Path:
        """Returns the path that holds the lines of a complete file.

        Raises:
            Refused: the file is missing, or its size differs from the recorded size.
        """
        unnamed = not self.path.exists() and self._partial.exists()
        file = self._partial if unnamed else self.path
        size = _size(file)
        if not file.exists() or size != self._bytes:
            state = f"has {size} bytes" if file.exists() else "is missing"
            raise Refused(
                f"{file} {state}, but {self._completed} records {self._bytes} bytes. Restore "
                f"{file} from a copy, choose {self._elsewhere}, or remove {self.path}* to start "
                "again."
            )
        return file

    def _check_record(self) -> None:
        """Raises Refused if the partial file has no record, or fewer bytes than recorded."""
        size = _size(self._partial)
        if size and not self._record.exists():
            raise Refused(
                f"{self._partial} cannot be resumed: its record {self._record.name} is missing, so "
                f"it is unknown which inputs and settings its {size} bytes came from. "
                f"Choose {self._elsewhere}, or remove {self._partial} to start again."
            )
        if size < self._bytes:
            raise Refused(
                f"{self._partial} has {size} bytes, but {self._record.name} counts {self._bytes}, "
                "so part of it is missing. Restore both from a copy, choose "
                f"{self._elsewhere}, or remove {self.path}.* to start again."
            )

    def _resume(self) -> None:
        """Truncates the partial file to its recorded size; creates both if there are none."""
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
        record = schema.sealed(record, SEAL)
        write_atomic(self._record, json.dumps(record, indent=2) + "\n")


def _size(path: epath.Path) -> int:
    return path.stat().length if path.exists() else 0
