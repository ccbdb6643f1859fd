"""Modules and folders of the user that Python imports instead of a package of this library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import mpt_jax

NAMES = ("mpt_jax", "t5x", "tasks")


def find(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the name and path of each module or folder that shadows one of `NAMES` in a process
    that searches `folder` first, as `python -m` does in its working directory.

    Python imports a folder without an `__init__.py` only if no other place on its path has the
    name, so a clone of T5X below `folder` shadows nothing. Other installations of T5X are omitted.
    """
    package = Path(mpt_jax.__file__).resolve().parent
    ours = {package, package.with_name("t5x.py")}
    for name in NAMES:
        spec = PathFinder.find_spec(name, [str(folder), *sys.path])
        if spec is None:
            continue
        locations = list(spec.submodule_search_locations or [])
        path = Path(locations[0] if locations else str(spec.origin))
        if path.resolve() not in ours and not (path / "train_state.py").is_file():
            yield name, path
