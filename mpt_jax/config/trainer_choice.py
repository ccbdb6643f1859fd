"""Choice of the module that `import t5x` finds in this process: a real T5X or the fallback.

    MPT_JAX_TRAINER=t5x   a real T5X, or an error
    MPT_JAX_TRAINER=own   the fallback, even if a real T5X is installed
    unset                 a real T5X if one is installed, else the fallback

The choice is made once. `python -m mpt_jax.train` always chooses the fallback.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import mpt_jax

VARIABLE = "MPT_JAX_TRAINER"
_ANNOUNCED: list[str] = []
FOLDER = Path(__file__).parents[1] / "t5x_compat" / "fallback"
# The fallback's modules, for `import t5x.<name>`, and its scripts, for `python -m`.
OFFERED = ("gin_utils", "partitioning", "trainer", "utils")
SCRIPTS = ("eval", "infer", "train")
INSTALL = (
    "T5X is not on PyPI. To use it, clone https://github.com/google-research/t5x, and install the "
    "clone or add it to PYTHONPATH."
)


def requested_trainer() -> str | None:
    """Returns the trainer that MPT_JAX_TRAINER requests, or None.

    Raises:
        ValueError: the variable has an unknown value.
    """
    value = os.environ.get(VARIABLE) or None
    if value not in (None, "t5x", "own"):
        raise ValueError(
            f"{VARIABLE} must be 't5x', 'own' or unset, got {value!r}. Correct or unset this "
            "environment variable."
        )
    return value


def find_real() -> ModuleSpec | None:
    """Returns the spec of the first T5X that `all_real` yields, or None."""
    return next(all_real(), None)


def all_real() -> Iterator[ModuleSpec]:
    """Yields the specs of all T5X installations that can be imported, in Python's search order.

    Every entry of `sys.path` is searched separately, because the first match may be this library's
    t5x.py. Then every other finder is asked, since editable installs add finders. A folder or
    package named t5x counts as T5X only if it has an `__init__.py` and a `train_state.py`.
    """
    path_finder = importlib.machinery.PathFinder
    candidates = [path_finder.find_spec("t5x", [entry]) for entry in sys.path]
    for finder in sys.meta_path:
        if finder is not path_finder and not isinstance(finder, _NotOffered):
            candidates.append(finder.find_spec("t5x", None))
    for spec in candidates:
        if spec is not None and spec.origin and spec.submodule_search_locations:
            if Path(spec.origin).with_name("train_state.py").is_file():
                yield spec


def activate(name: str) -> None:
    """Puts the chosen module into `sys.modules` under `name`; `t5x.py` calls this on import.

    Raises:
        ImportError: MPT_JAX_TRAINER requests a real T5X, and none is installed.
        ValueError: MPT_JAX_TRAINER has an unknown value.
    """
    choice = requested_trainer()
    real = find_real() if choice != "own" else None
    if real is None and choice == "t5x":
        raise ImportError(
            f"{VARIABLE}=t5x, but no T5X can be imported. {INSTALL} To use this library's trainer, "
            f"unset {VARIABLE}.",
            name=name,
        )
    if real is None:
        install_fallback()
        return
    if sys.argv[:1] == ["-m"]:  # python -m t5x.train, not an import
        announce(f"T5X from {real.origin}, found by mpt_jax {mpt_jax.__version__}")
    _show_gin_files()
    module = importlib.util.module_from_spec(real)
    sys.modules[name] = module
    assert real.loader is not None
    real.loader.exec_module(module)


def gin_folder() -> Path:
    """Returns the folder that contains this library's `gin/`, in a clone or an installed wheel."""
    package = Path(mpt_jax.__file__).parent
    installed = package / "configs"
    return installed if (installed / "gin").is_dir() else package.parent


def _show_gin_files() -> None:
    """Lets T5X find this library's gin files from any folder. By default, T5X searches only the
    working directory and its own clone."""
    import gin  # imported only if T5X runs, which needs it as well

    gin.add_config_file_search_path(str(gin_folder()))


def announce(trainer: str) -> None:
    """Prints which trainer runs, once, as the first line of a job's log.

    Writes to stderr directly, because the imports that set up logging already log lines.
    """
    if not _ANNOUNCED:
        _ANNOUNCED.append(trainer)
        print(f"Trainer: {trainer}.", file=sys.stderr, flush=True)


def announce_own() -> None:
    """Prints that this library's trainer runs."""
    announce(f"mpt_jax {mpt_jax.__version__} (T5X is not used)")


def install_fallback() -> types.ModuleType:
    """Installs the fallback as the module `t5x`, even if a real T5X is installed; returns it.

    Raises:
        ImportError: a real T5X is already loaded in this process.
    """
    loaded = sys.modules.get("t5x")
    if is_real(loaded):
        raise ImportError(
            f"T5X is already loaded from {getattr(loaded, '__file__', '?')}, so this process "
            "cannot use the trainer of MPT-JAX. Start a new process that imports mpt_jax before "
            "t5x, or set MPT_JAX_TRAINER=own in its environment."
        )
    if getattr(loaded, "__embedded__", False):
        assert loaded is not None
        return loaded
    module = types.ModuleType("t5x", "T5X's names, provided by mpt_jax.t5x_compat.fallback.")
    module.__file__ = str(FOLDER / "__init__.py")
    module.__path__ = [str(FOLDER)]
    module.__spec__ = ModuleSpec("t5x", None, origin=module.__file__, is_package=True)
    module.__spec__.submodule_search_locations = module.__path__
    vars(module)["__embedded__"] = True
    sys.modules["t5x"] = module
    sys.meta_path.append(_NotOffered())
    return module


def is_real(module: types.ModuleType | None) -> bool:
    """Whether a loaded `t5x` module is T5X itself."""
    has_path = getattr(module, "__path__", None) is not None
    return has_path and not getattr(module, "__embedded__", False)


class _NotOffered:
    """Last import finder for `t5x.<name>`, whose error explains how to install T5X."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Raises ModuleNotFoundError for every module of T5X that the fallback does not have;
        returns None for other modules."""
        if not name.startswith("t5x.") or is_real(sys.modules.get("t5x")):
            return None
        raise ModuleNotFoundError(
            f"{name} is part of T5X, but this process uses the fallback of mpt_jax, which has only "
            f"the modules {', '.join(OFFERED)} and the scripts {', '.join(SCRIPTS)}. If T5X is "
            f"installed, unset {VARIABLE} and run `python -m t5x.train`. {INSTALL}",
            name=name.partition(".")[0],
        )
