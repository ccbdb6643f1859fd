"""Folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator

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
        for folder, _, names in os.walk(scratch):
            for name in names:
                with open(os.path.join(folder, name), "rb") as written:
                    os.fsync(written.fileno())
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
