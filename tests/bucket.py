"""A bucket that is a folder: `gs://...` through etils' own path classes, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from etils.epath import backend

PREFIX = "gs://bucket"


class _Folder:
    """Answers etils' calls from the local file system."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        call = getattr(backend.os_backend, name)
        return lambda *args, **kwargs: call(*map(self._local, args), **kwargs)

    def _local(self, argument: Any) -> Any:
        text = str(argument)
        return text.replace(PREFIX, str(self._folder)) if text.startswith(PREFIX) else argument


def mount(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Lets a folder be read and written as a bucket; returns the bucket's name."""
    patch.setattr(backend, "tf_backend", _Folder(folder))
    return PREFIX
