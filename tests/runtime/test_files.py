"""Atomic writes of files and folders: order of syncs and renames, failures, buckets."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from etils import epath

from mpt_jax.runtime import files
from mpt_jax.runtime.files import new_folder, replace_folder, write_atomic
from tests.fixtures import fake_gcs


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The order of synced files and renames, without random scratch names."""
    made: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(descriptor):
        found = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        made.append("sync scratch" if found.suffix == ".tmp" else f"sync {found.name}")
        fsync(descriptor)

    def renamed(call):
        def to(source, target, **kwargs):
            made.append(f"rename to {os.path.basename(target)}")
            call(source, target, **kwargs)

        return to

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed(replace))
    monkeypatch.setattr(os, "rename", renamed(rename))
    return made


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["a ü\n", b"\x00\xff"])
def test_write_atomic_replaces_the_content(content, tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == ["file"]


def test_write_atomic_syncs_before_the_rename(tmp_path, calls):
    write_atomic(tmp_path / "file", "new")
    assert calls == ["sync scratch", "rename to file"]
    calls.clear()
    write_atomic(tmp_path / "file", "new", sync=False)
    assert calls == ["rename to file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomic_failure_keeps_the_old_content(step, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert contents(tmp_path) == {"file": "old"}


def test_write_atomic_to_a_full_disk_keeps_the_old_content(tmp_path, monkeypatch):
    class Full:
        """A file that takes half of what is written."""

        def __init__(self, path, mode):
            self._file = open(path, mode)  # noqa: SIM115 - closed by the block that opens this

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def write(self, data):
            self._file.write(data[: len(data) // 2])
            full_disk()

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(files, "open", Full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "newer")
    assert contents(tmp_path) == {"file": "old"}


def test_write_atomic_to_a_bucket_writes_in_place(tmp_path, monkeypatch, calls):
    bucket = fake_gcs.mount(tmp_path, monkeypatch)
    write_atomic(f"{bucket}/file", "old")
    write_atomic(f"{bucket}/file", "new")
    assert contents(tmp_path) == {"file": "new"}
    assert not calls, "a rename in a bucket is a copy and a delete"


# --- Folders -------------------------------------------------------------------------------------


def fill(folder: epath.Path, content: str) -> None:
    (folder / "a").write_text(content)
    (folder / "b").write_text(content)


def test_new_folder_syncs_its_files_before_the_rename(tmp_path, calls):
    with new_folder(tmp_path / "deep" / "folder") as made:
        fill(made, "new")
    assert sorted(calls[:2]) == ["sync a", "sync b"] and calls[2:] == ["rename to folder"]
    assert contents(tmp_path / "deep" / "folder") == {"a": "new", "b": "new"}
    with pytest.raises(FileExistsError), new_folder(tmp_path / "deep" / "folder"):
        pass


def test_replace_folder_syncs_its_files_before_the_swap(tmp_path, calls):
    with replace_folder(tmp_path / "folder") as made:
        fill(made, "old")
    calls.clear()
    with replace_folder(tmp_path / "folder") as made:
        fill(made, "new")
        assert contents(tmp_path / "folder") == {"a": "old", "b": "old"}
    assert sorted(calls[:2]) == ["sync a", "sync b"]
    assert calls[2:] == ["rename to .folder.old", "rename to folder"]
    assert names(tmp_path) == ["folder"]
    assert contents(tmp_path / "folder") == {"a": "new", "b": "new"}


@pytest.mark.parametrize("step", ["block", "sync", "swap"])
def test_replace_folder_failure_keeps_the_old_folder(step, tmp_path, monkeypatch):
    folder, rename = tmp_path / "folder", os.rename
    with replace_folder(folder) as made:
        fill(made, "old")

    def swap(source, target):
        if str(source).endswith(".new"):
            full_disk()
        rename(source, target)

    if step != "block":
        change = {"sync": ("fsync", full_disk), "swap": ("rename", swap)}[step]
        monkeypatch.setattr(os, *change)
    with pytest.raises(OSError, match="No space left"), replace_folder(folder) as made:
        fill(made, "new")
        if step == "block":
            full_disk()
    assert names(tmp_path) == ["folder"]
    assert contents(folder) == {"a": "old", "b": "old"}


def test_replace_folder_recovers_the_old_folder_of_a_killed_swap(tmp_path):
    (tmp_path / ".folder.old").mkdir()
    fill(epath.Path(tmp_path / ".folder.old"), "old")
    (tmp_path / ".folder.new").mkdir()
    with pytest.raises(OSError, match="No space left"), replace_folder(tmp_path / "folder"):
        full_disk()
    assert names(tmp_path) == ["folder"]
    assert contents(tmp_path / "folder") == {"a": "old", "b": "old"}
