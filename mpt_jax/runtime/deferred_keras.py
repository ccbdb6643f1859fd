"""TensorFlow without Keras, until something uses `tf.keras`.

Keras comes with matplotlib and scikit-learn, and data pipelines use none of them. TensorFlow
imports it when it starts, so that Keras can register its optimizers for saved models, and accepts
that it cannot be imported. TensorFlow Text imports it for one layer.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

_LAYERS = "tensorflow_text.python.keras"


def defer_keras() -> None:
    """Makes TensorFlow and TensorFlow Text load Keras on use; call it before they are imported."""
    sys.meta_path.insert(0, _DeferredKeras())


class _DeferredKeras(importlib.abc.MetaPathFinder):
    """Import hook that refuses to load Keras while TensorFlow is imported, and loads TensorFlow
    Text's Keras layers when an attribute of them is read."""

    def find_spec(
        self, name: str, path: Any, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of a module whose loading is refused or put off; None for others."""
        refused = name == "keras" and _is_importing("tensorflow")
        if not refused and name != _LAYERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        if refused:  # TensorFlow still needs to find its folder
            spec.loader.exec_module = _refuse  # type: ignore[method-assign]
        else:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def _is_importing(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "_initializing", False)


def _refuse(module: types.ModuleType) -> None:
    raise ImportError(f"{module.__name__} is imported when tf.keras is used")
