"""Import alias `tasks` for `mpt_jax.tasks`, if the user has no `tasks` module.

In earlier versions the suites were the top-level package `tasks`. T5X projects commonly have a
module of this name, so a user's module always takes precedence. Otherwise
`TASK_MODULES = ["tasks.glue"]` and `import tasks.glue` load the modules of `mpt_jax.tasks`, as the
same module objects, so that no task is registered twice.
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
    """Import finder and loader for `tasks` and its submodules."""

    def find_spec(
        self, name: str, path: Any = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of a suite under its old name; None if the user has a `tasks` module."""
        # `path` is Any: a namespace package's is not the Sequence that typeshed declares.
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
        """Returns the suite's module itself, not a copy."""
        module = importlib.import_module(NEW + spec.name.removeprefix(OLD))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Restores the module's own spec, which the import as `tasks` has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Adds the finder to `sys.meta_path`, once."""
    if not any(isinstance(finder, TasksAlias) for finder in sys.meta_path):
        sys.meta_path.insert(0, TasksAlias())
