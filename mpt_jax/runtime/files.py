"""Paths and files, here or in a bucket.

Folders appear complete or not at all; in a bucket, where files cannot be renamed at once, under
their name only when all is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """A scratch folder beside `path` that takes its name when the block ends without an error.

    Raises:
        FileExistsError: `path` is there already, and is left alone.
    """
    target = epath.Path(path)
    if target.exists():
        raise FileExistsError(f"{target} exists already and is not overwritten.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    scratch.mkdir()
    try:
        yield scratch
        if is_local(target):
            for folder, _, names in os.walk(scratch):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as written:
                        os.fsync(written.fileno())
        scratch.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.rmtree()
        raise


def is_local(path: epath.Path) -> bool:
    """Whether a path is on this machine's file system, and not in a bucket."""
    return "://" not in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """The path from the root, which Orbax and TensorStore insist on; in a bucket it is one."""
    return epath.Path(os.path.abspath(path)) if is_local(path) else path


def read_json(path: epath.Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or no object.
    """
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object.")
    return found
