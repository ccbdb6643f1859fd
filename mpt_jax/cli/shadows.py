"""Modules and folders of the user that Python imports instead of a package of this library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mpt_jax

NAMES = ("mpt_jax", "t5x", "tasks")


def find(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the name and path of each module or folder in `folder` that shadows one of `NAMES`.

    A folder counts even without Python files, because Python imports it as a namespace package. A
    clone of T5X counts as T5X.
    """
    package = Path(mpt_jax.__file__).resolve().parent
    ours = {package, package.with_name("t5x.py")}
    for name in NAMES:
        for path in (folder / name, folder / f"{name}.py"):
            exists = path.is_file() if path.suffix else path.is_dir()
            if exists and path.resolve() not in ours and not (path / "train_state.py").is_file():
                yield name, path
                break
