"""`tasks` as another name of `mpt_jax.tasks`, in a process that has no `tasks` of its own.

The suites were once a top-level package, and T5X projects commonly have a `tasks.py`. A user's own
module always wins. Where there is none, `TASK_MODULES = ["tasks.glue"]` and `import tasks.glue`
find the suites, as the same module objects, so that nothing registers twice.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

OLD, NEW = "tasks", "mpt_jax.tasks"


class TasksAlias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A finder and loader that answers for `tasks` and its modules."""

    def find_spec(
        self, name: str, path: Any = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the suite under its old name; None if a `tasks` of the user exists."""
        # `path` has no type: that of a namespace package is not the Sequence that typeshed claims.
        if name == OLD:
            others = [finder for finder in sys.meta_path if finder is not self]
            if any(finder.find_spec(name, path, target) is not None for finder in others):
                return None
        elif not name.startswith(f"{OLD}.") or sys.modules.get(OLD) is not sys.modules.get(NEW):
            return None
        try:
            new = importlib.import_module(NEW + name.removeprefix(OLD))
        except ModuleNotFoundError:
            return None
        return ModuleSpec(name, self, is_package=hasattr(new, "__path__"))

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """The suite itself, not a copy."""
        module = importlib.import_module(NEW + spec.name.removeprefix(OLD))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Restores the spec, which importing under another name has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Adds the finder, once."""
    if not any(isinstance(finder, TasksAlias) for finder in sys.meta_path):
        sys.meta_path.insert(0, TasksAlias())
