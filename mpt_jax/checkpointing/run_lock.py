"""Run lock: one job at a time writes to a MODEL_DIR.

    MODEL_DIR/running.json     the job that writes (host, process, start time), and a count

The job that writes to a MODEL_DIR increments the count every few seconds. On the same machine, the
process table shows whether that job is alive. Otherwise (another host, a bucket) the next job
watches the count: a job whose count does not change has ended. Clocks are never compared, so it
does not matter if a clock jumps or the clocks of two hosts differ.

Readers (evaluation, inference, reports) neither take the lock nor check it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mpt_jax.core import schema
from mpt_jax.runtime.files import write_atomic

FILE = "running.json"
PERIOD, PATIENCE = 10.0, 35.0  # seconds between increments; seconds that a count is watched


class ModelDirInUse(RuntimeError):
    """Another job is writing to this MODEL_DIR."""


@contextlib.contextmanager
def acquire(
    model_dir: str, *, period: float = PERIOD, patience: float = PATIENCE
) -> Iterator[Callable[..., None]]:
    """Keeps other jobs out of MODEL_DIR while the block runs; creates the folder.

    Args:
        model_dir: the path of MODEL_DIR.
        period: the seconds between two increments of the count.
        patience: the seconds to watch the count of a job on another machine; several periods.

    Yields:
        `Lock.check`, which raises ModelDirInUse if another job has taken MODEL_DIR. That can
        happen if this job was suspended for longer than `patience`. In processes other than 0, a
        function that does nothing.

    Raises:
        ModelDirInUse: another job is writing to MODEL_DIR, or another process of this job could
            not start.
        OSError: MODEL_DIR cannot be created or written.
    """
    lock, refusal = None, None
    try:
        check_writable(model_dir)
        if jax.process_index() == 0:
            lock = Lock(model_dir, period, patience)
    except Exception as error:  # noqa: BLE001 - raised in all processes by `_agree`
        refusal = error
    _agree(refusal)
    try:
        yield lock.check if lock is not None else lambda read=False: None
    finally:
        if lock is not None:
            lock.release()


def check_writable(model_dir: str) -> None:
    """Creates MODEL_DIR and tries to write to it.

    Raises:
        OSError: MODEL_DIR cannot be created or written.
    """
    path = epath.Path(model_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write_probe_{jax.process_index()}"
        probe.write_text("is there room?")
        probe.unlink()
    except Exception as error:  # TensorFlow's errors for buckets are not OSErrors
        raise OSError(
            f"MODEL_DIR {model_dir} cannot be written: {str(error).rstrip('.')}. Fix the cause "
            "(for example, permissions or disk space), or choose another MODEL_DIR."
        ) from error


class Record(msgspec.Struct):
    """The schema of running.json."""

    host: str
    pid: schema.Positive
    since: str
    machine: str
    token: str
    process_start: int | None = None


class Lock:
    """The lock of a job on its MODEL_DIR, held by process 0.

    Arguments and errors are those of `acquire`.
    """

    def __init__(self, model_dir: str, period: float = PERIOD, patience: float = PATIENCE):
        self._path = epath.Path(model_dir) / FILE
        self._refuse_if_taken(patience)
        self._record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "machine": _machine(),
            "process_start": _start_of(os.getpid()),
            "token": uuid.uuid4().hex,
            "count": 0,
        }
        self._taken_by: str | None = None
        self._ended = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._keep, args=(period,), daemon=True)
        self._thread.start()

    def check(self, read: bool = False) -> None:
        """Raises ModelDirInUse if another job has taken MODEL_DIR.

        Args:
            read: whether to read the file now, because the process may have been suspended since
                the last increment of the count. Otherwise uses the result of that increment.
        """
        if read:
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - as in `_keep`
                logging.warning("%s could not be read: %s", self._path, error)
        if self._taken_by is not None:
            raise ModelDirInUse(
                f"{self._path.parent} was taken over by {self._taken_by}, so this job ends without "
                "saving. This job was probably suspended, or unable to write, for a while. Wait "
                "until the other job has ended before you rerun this command."
            )

    def release(self) -> None:
        """Releases the lock."""
        self._ended.set()
        self._thread.join()
        try:
            if self._is_ours():
                self._path.unlink(missing_ok=True)
        # Must not hide the error that ended the job; the next job recognizes a stale file.
        except Exception as error:  # noqa: BLE001
            logging.warning("%s could not be removed: %s", self._path, error)

    def _refuse_if_taken(self, patience: float) -> None:
        if (content := _read(self._path)) is None:
            return
        record = _parsed(content)
        if record.get("machine") == _machine():
            alive = _start_of(record["pid"]) == record.get("process_start")
        else:
            logging.info(
                "%s was written by %s. Waiting up to %.0f s to see whether that job is alive.",
                self._path,
                _who(record),
                patience,
            )
            alive = _changes(self._path, content, patience)
        if alive:
            raise ModelDirInUse(
                f"{self._path.parent} is being written by {_who(record)}. Wait until that process "
                "has ended, stop it, or choose another MODEL_DIR."
            )
        logging.info("%s is left over from %s, which has ended.", self._path, _who(record))

    def _keep(self, period: float) -> None:
        while not self._ended.wait(period):
            try:
                self._look()
                if self._taken_by is not None:
                    return
                self._record["count"] += 1
                self._write()
            # A full disk or unreachable bucket (TensorFlow's is not an OSError): saving will raise.
            except Exception as error:  # noqa: BLE001
                logging.warning("%s could not be written: %s", self._path, error)

    def _look(self) -> None:
        if not self._is_ours():
            content = _read(self._path)
            self._taken_by = _who(_parsed(content)) if content else "an unknown job"

    def _is_ours(self) -> bool:
        content = _read(self._path)
        return content is not None and _parsed(content).get("token") == self._record["token"]

    def _write(self) -> None:
        # Not synced: a slow disk must not make a live job look dead, and after a power loss no job
        # is alive, whatever the file contains.
        write_atomic(self._path, json.dumps(self._record), sync=False)


def _agree(refusal: Exception | None) -> None:
    """Raises an error in every process if any process has one."""
    refused = [refusal is not None]
    if jax.process_count() > 1:
        refused = np.ravel(multihost_utils.process_allgather(np.asarray(refused[0]))).tolist()
    if refusal is not None:
        raise refusal
    if any(refused):
        raise ModelDirInUse(
            f"Process {refused.index(True)} of this job could not start, so no process starts. "
            f"See the log of process {refused.index(True)}."
        )


def _changes(path: epath.Path, content: str, patience: float) -> bool:
    """Whether the file gets new content within `patience` seconds; False if it is removed."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        time.sleep(min(1.0, patience / 10))
        if (now := _read(path)) != content:
            return now is not None
    return False


def _read(path: epath.Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _parsed(content: str) -> dict[str, Any]:
    """Returns the parsed record, or an empty one if it is not a lock's record."""
    try:
        record = schema.parse(content, FILE)
        schema.check(record, Record, FILE)
        return record
    except ValueError:
        return {}


def _who(record: dict[str, Any]) -> str:
    fields = {name: record.get(name, "unknown") for name in ("pid", "host", "since")}
    return "process {pid} on host {host}, since {since}".format(**fields)


def _machine() -> str:
    """Returns an id of the scope in which process ids are unique: a boot of a host or container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux has these files
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(pid: int) -> int | None:
    """Returns the start time of a process in ticks since boot, or None if it has ended.

    The start time distinguishes processes that reuse an id. Without Linux's process table, returns
    0 for any running process.
    """
    try:
        if not Path("/proc/self/stat").exists():
            os.kill(pid, 0)
            return 0
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except PermissionError:
        return 0  # another user's process, and alive
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18])
