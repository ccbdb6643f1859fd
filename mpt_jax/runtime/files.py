"""Atomic writes of files and folders, local or in a storage bucket.

A local file or folder is written under a scratch name beside its target, synced, and renamed. A
bucket publishes an object when its upload is complete, so its files are written in place. A bucket
has no folders to rename: objects are copied one by one, so a folder may be incomplete until the
function that writes it has returned.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from mpt_jax.core import schema


def write_atomic(path: str | os.PathLike[str], content: bytes | str, *, sync: bool = True) -> None:
    """Writes a file so that it holds either the old or the new content, even after a crash.

    Args:
        path: the file; its folder must exist.
        content: bytes, or text that is written as UTF-8.
        sync: whether to wait until the content is on disk. Otherwise a power loss may leave an
            empty file.

    Raises:
        OSError: the file cannot be written; the old content stays and the scratch file is removed.
    """
    target = epath.Path(path)
    data = content.encode() if isinstance(content, str) else content
    if not is_local(target):
        target.write_bytes(data)
        return
    scratch = _scratch_name(target)
    try:
        with open(scratch, "wb") as file:
            file.write(data)
            file.flush()
            if sync:  # before the rename, or a power loss may keep the name and lose the content
                os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """Yields a scratch folder, and renames it to `path` when the block ends without an error.

    Raises:
        FileExistsError: `path` exists; it is not changed.
        OSError: the folder cannot be written; the scratch folder is removed.
    """
    target = epath.Path(path)
    if target.exists():
        raise FileExistsError(
            f"{target} already exists. Choose another folder, or move or remove the existing one."
        )
    with _filled(_scratch_name(target)) as scratch:
        yield scratch
        _sync(scratch)
        scratch.rename(target)


@contextlib.contextmanager
def replace_folder(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """Yields a scratch folder, which replaces `path` when the block ends without an error.

    Only one writer may run at a time, because a writer removes what a killed writer left behind.
    While the folders are swapped, a reader may briefly find no folder, but never a partial one.

    Raises:
        OSError: the folder cannot be written; the old one stays.
    """
    target = epath.Path(path)
    new, old = (target.parent / f".{target.name}.{suffix}" for suffix in ("new", "old"))
    if old.exists() and not target.exists():  # a writer was killed between the renames
        old.rename(target)
    for stale in (new, old):
        if stale.exists():
            stale.rmtree()
    with _filled(new):
        yield new
        _sync(new)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    if old.exists():
        old.rmtree()


def _scratch_name(target: epath.Path) -> epath.Path:
    """Returns a hidden path beside a target, different at every call, so writers never share it."""
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"


@contextlib.contextmanager
def _filled(scratch: epath.Path) -> Iterator[epath.Path]:
    """Creates a folder; removes it if the block fails."""
    scratch.mkdir(parents=True)
    try:
        yield scratch
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.rmtree()
        raise


def _sync(folder: epath.Path) -> None:
    """Waits until the files of a local folder are on disk."""
    if not is_local(folder):
        return
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as written:
                os.fsync(written.fileno())


def is_local(path: epath.Path) -> bool:
    """Whether a path is on this machine's file system rather than in a bucket."""
    return "://" not in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """Returns the absolute path, which Orbax and TensorStore require; keeps bucket paths."""
    return epath.Path(os.path.abspath(path)) if is_local(path) else path


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the content is not JSON, or not an object.
    """
    value = schema.parse(path.read_bytes(), f"{path}", "Correct it, or download or copy it again.")
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} is not a JSON object: its value has the type {type(value).__name__}. Correct "
            "it, or download or copy it again."
        )
    return value
