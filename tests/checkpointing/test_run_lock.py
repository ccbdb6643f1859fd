"""Run lock: a run is refused while another one is alive, and admitted when that has ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpt_jax.checkpointing import run_lock
from mpt_jax.checkpointing.run_lock import ModelDirInUse, acquire

QUICK = {"period": 0.05, "patience": 0.6}
HOLDER = """
import sys, time
from mpt_jax.checkpointing import run_lock as lock
with lock.acquire(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(model_dir: Path) -> Iterator[subprocess.Popen]:
    """A process on this machine that holds the lock of MODEL_DIR; killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(model_dir)],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def record_of(model_dir: Path) -> dict:
    return json.loads((model_dir / run_lock.FILE).read_text())


def as_of_another_host(model_dir: Path, **changes) -> None:
    """Rewrites the record as if a run of another host had left it."""
    changes = {"machine": "elsewhere", "host": "elsewhere", "token": "other"} | changes
    record = (
        record_of(model_dir) if (model_dir / run_lock.FILE).exists() else {"pid": 7, "since": "x"}
    )
    (model_dir / run_lock.FILE).write_text(json.dumps(record | changes))


def test_run_lock_held_by_live_process_refused_until_killed(tmp_path):
    with holder(tmp_path) as child:
        before = time.monotonic()
        with pytest.raises(ModelDirInUse) as refusal, acquire(str(tmp_path)):
            pass
        assert time.monotonic() - before < 5, "on the same machine there is no waiting"
    message = str(refusal.value)
    since = record_of(tmp_path)["since"]
    assert f"process {child.pid} on host {os.uname().nodename}, since {since}" in message
    assert "choose another MODEL_DIR" in message and str(tmp_path) in message
    assert record_of(tmp_path)["pid"] == child.pid, "a killed run leaves its lock file"
    with acquire(str(tmp_path)):
        assert record_of(tmp_path)["pid"] == os.getpid()
    assert not list(tmp_path.iterdir()), "a run that ends leaves nothing"


def test_run_lock_reused_process_id_acquired(tmp_path):
    with acquire(str(tmp_path)):
        record = record_of(tmp_path)
    left = record | {"process_start": record["process_start"] - 1, "token": "other"}
    (tmp_path / run_lock.FILE).write_text(json.dumps(left))
    with acquire(str(tmp_path)):
        assert record_of(tmp_path)["token"] != "other"


@pytest.mark.parametrize("content", ["{", "[1]", "{}"])
def test_run_lock_unreadable_record_acquired_after_watching(tmp_path, content):
    (tmp_path / run_lock.FILE).write_text(content)
    with acquire(str(tmp_path), **QUICK):
        assert record_of(tmp_path)["pid"] == os.getpid()


def test_run_lock_count_of_other_host_increases_refused(tmp_path):
    with acquire(str(tmp_path), **QUICK):
        record = record_of(tmp_path)
        # The same run as another host sees it: the file changes, and no process can be asked.
        elsewhere = pytest.MonkeyPatch()
        elsewhere.setattr(run_lock, "_machine", lambda: "another host")
        with (
            pytest.raises(ModelDirInUse, match=f"process {record['pid']}"),
            acquire(str(tmp_path), **QUICK),
        ):
            pass
        elsewhere.undo()
    assert not (tmp_path / run_lock.FILE).exists()


def test_run_lock_count_of_other_host_unchanged_acquired(tmp_path):
    as_of_another_host(tmp_path)
    before = time.monotonic()
    with acquire(str(tmp_path), **QUICK):
        assert time.monotonic() - before >= QUICK["patience"]
        assert record_of(tmp_path)["pid"] == os.getpid()


def test_run_lock_clock_jumps_no_effect(tmp_path, monkeypatch):
    """Whatever the clock shows, a run that has ended is not alive, and a live run is."""
    jumps = iter(range(10**9, 0, -86400))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    as_of_another_host(tmp_path, since="2099-01-01 00:00:00 +0000")
    with acquire(str(tmp_path), **QUICK) as check:
        monkeypatch.setattr(run_lock, "_machine", lambda: "another host")
        with pytest.raises(ModelDirInUse), acquire(str(tmp_path), **QUICK):
            pass
        check()


def test_run_lock_taken_over_check_raises_and_keeps_new_owner(tmp_path):
    with acquire(str(tmp_path), **QUICK) as check:
        check()
        as_of_another_host(tmp_path)
        deadline = time.monotonic() + 10
        with pytest.raises(ModelDirInUse, match="taken over by process .* on host elsewhere"):
            while time.monotonic() < deadline:
                check()
                time.sleep(0.01)
    assert record_of(tmp_path)["token"] == "other"


def test_run_lock_check_with_read_detects_takeover(tmp_path):
    with acquire(str(tmp_path), period=3600.0) as check:  # no increment in between
        as_of_another_host(tmp_path)
        check()
        with pytest.raises(ModelDirInUse, match="taken over by"):
            check(read=True)


def test_run_lock_release_fails_original_error_raised(tmp_path, monkeypatch):
    def unreachable(path):
        raise OfABucket(path)

    with pytest.raises(KeyError), acquire(str(tmp_path)):
        monkeypatch.setattr(run_lock, "_read", unreachable)
        raise KeyError


def test_run_lock_error_in_block_released(tmp_path):
    with pytest.raises(KeyError), acquire(str(tmp_path)):
        raise KeyError
    with acquire(str(tmp_path)):
        pass


class OfABucket(Exception):
    """Like TensorFlow's errors for buckets, not an OSError."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OfABucket("try again")])
def test_run_lock_count_cannot_be_written_retried(error, tmp_path, monkeypatch):
    with acquire(str(tmp_path), **QUICK) as check:
        write = run_lock.Lock._write

        def full(self):
            raise error

        monkeypatch.setattr(run_lock.Lock, "_write", full)
        time.sleep(0.3)
        check()
        stood = record_of(tmp_path)["count"]
        monkeypatch.setattr(run_lock.Lock, "_write", write)
        time.sleep(0.3)
        assert record_of(tmp_path)["count"] > stood


def test_run_lock_unwritable_model_dir_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with (
        pytest.raises(OSError, match=f"MODEL_DIR {blocked}/model cannot be written"),
        acquire(str(blocked / "model")),
    ):
        pass
