"""Resumable files: locally and in a bucket, without locks, and from earlier versions."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from mpt_jax.core import schema
from mpt_jax.runtime.resumable_output import SEAL, Refused, ResumableFile
from tests.fixtures import fake_gcs

MADE_FROM = {"mode": "predict", "step": 3}


def output(path, made_from=MADE_FROM, **settings) -> ResumableFile:
    return ResumableFile(path, made_from, require_lock=False, **settings)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture(params=["local", "bucket"])
def path(request, tmp_path, monkeypatch) -> str:
    local = request.param == "local"
    return f"{tmp_path if local else fake_gcs.mount(tmp_path, monkeypatch)}/out"


def test_resumable_file_lines_after_record_truncated(path, tmp_path):
    first = output(path)
    assert first.begin() == 0
    first.append(["a", "b"])
    first.append([])
    first.close()
    with (tmp_path / "out.partial").open("a") as file:
        file.write("c\nhalf")
    again = output(path)
    assert not again.is_complete()
    assert again.begin() == 2 and (tmp_path / "out.partial").read_text() == "a\nb\n"
    again.append(["ü"])
    again.finish()
    found = contents(tmp_path)
    assert sorted(found) == ["out", "out.COMPLETED"] and found["out"] == "a\nb\nü\n"
    record = {"made_from": MADE_FROM, "lines": 3, "bytes": 7}
    assert json.loads(found["out.COMPLETED"]) == schema.sealed(record, SEAL)
    whole = output(path)
    assert whole.is_complete() and whole.begin() is None and contents(tmp_path) == found


def test_resumable_file_without_lines_other_inputs_accepted(path, tmp_path):
    first = output(path)
    first.begin()
    first.close()
    other = output(path, {**MADE_FROM, "step": 4})
    assert not other.is_complete() and other.begin() == 0
    other.append(["a"])
    other.close()
    assert json.loads(contents(tmp_path)["out.partial_of"])["made_from"]["step"] == 4
    for call in (output(path).is_complete, output(path).begin):
        with pytest.raises(Refused, match="step: saved 4, current 3"):
            call()


def test_resumable_file_record_without_counts_resumes_at_last_line(path, tmp_path):
    """Earlier versions of `infer` wrote such records."""
    (tmp_path / "out.partial").write_text("a\nb\nhalf")
    (tmp_path / "out.partial_of").write_text(json.dumps(MADE_FROM))
    with pytest.raises(Refused, match="step: saved 3, current 4"):
        output(path, {**MADE_FROM, "step": 4}).begin()
    again = output(path)
    assert not again.is_complete() and again.begin() == 2
    again.append(["c"])
    again.finish()
    assert contents(tmp_path)["out"] == "a\nb\nc\n"
    (tmp_path / "out.COMPLETED").write_text(json.dumps(MADE_FROM))
    assert output(path).is_complete() and output(path).begin() is None


def test_resumable_file_killed_in_finish_completed_on_restart(path, tmp_path):
    first = output(path)
    first.begin()
    first.append(["a"])
    first.finish()
    (tmp_path / "out").rename(tmp_path / "out.partial")
    again = output(path)
    assert not again.is_complete(), "the lines are still in the partial file"
    assert again.begin() is None and (tmp_path / "out").read_text() == "a\n"


def test_resumable_file_without_record_refused(path, tmp_path):
    (tmp_path / "out.partial").write_text("a\n")
    for call in (output(path).is_complete, output(path).begin):
        with pytest.raises(Refused, match="record out.partial_of is missing, .* its 2 bytes"):
            call()
    (tmp_path / "out").write_text("precious")
    for call in (output(path).is_complete, output(path).begin):
        with pytest.raises(Refused, match="not written by this command. Choose another file"):
            call()
    (tmp_path / "out.COMPLETED").write_text("")  # as T5X leaves it
    with pytest.raises(Refused, match="mode: saved nothing, current 'predict'"):
        output(path).is_complete()


def test_resumable_file_lock_unavailable_error_or_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(Refused, match="cannot be locked .*Function not implemented"):
        ResumableFile(tmp_path / "out", MADE_FROM).begin()
    with caplog.at_level("WARNING", logger="absl"):
        file = output(tmp_path / "out")
        file.begin()
    file.close()
    assert "Make sure that no other process writes it" in caplog.text


def test_resumable_file_in_bucket_lock_required_refused(tmp_path, monkeypatch):
    bucket = fake_gcs.mount(tmp_path, monkeypatch)
    with pytest.raises(Refused, match="buckets have no locks"):
        ResumableFile(f"{bucket}/out", MADE_FROM).begin()


def test_resumable_file_append_syncs_lines_before_record(tmp_path, monkeypatch):
    file, fsync = output(tmp_path / "out"), os.fsync
    file.begin()

    def counted(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("out.partial"):
            assert json.loads((tmp_path / "out.partial_of").read_text())["lines"] == 0
            assert (tmp_path / "out.partial").read_text() == "a\n"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    file.append(["a"])
    file.close()
    assert json.loads((tmp_path / "out.partial_of").read_text())["lines"] == 1


def test_resumable_file_full_disk_resumes_before_failed_lines(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = output(tmp_path / "out")
    file.begin()
    file.append(["a"])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        file.append(["b"])
    file.close()
    monkeypatch.undo()
    again = output(tmp_path / "out")
    assert again.begin() == 1
    again.close()
    assert (tmp_path / "out.partial").read_text() == "a\n"


def test_resumable_file_with_changed_record_refused(path, tmp_path):
    """Otherwise an example would be answered twice."""
    first = output(path)
    first.begin()
    first.append(["a", "b"])
    first.close()
    record = tmp_path / "out.partial_of"
    record.write_text(record.read_text().replace('"lines": 2', '"lines": 1'))
    with pytest.raises(Refused, match="partial_of cannot be read .* its record_sha256 is"):
        output(path).begin()
    fields = json.loads(record.read_text())
    del fields[SEAL]  # of an earlier version
    record.write_text(json.dumps({**fields, "lines": 2}))
    again = output(path)
    assert again.begin() == 2
    again.close()
