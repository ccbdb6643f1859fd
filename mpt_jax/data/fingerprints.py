"""Fingerprints of tokenized splits, for a cache that must never be stale.

A fingerprint covers everything that tokens depend on: the data (`source.fingerprint(split)`), the
preprocessors with all values that they hold, the Python code that they may run, vocabularies and
length limits. What cannot be described has no fingerprint, and is not cached.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import seqio

from mpt_jax.core.schema import short
from mpt_jax.data.preprocessors import AddTaskId

_FORMAT = 1  # of what `token_cache` writes
_OWN = __name__.partition(".")[0]
_OWN_PARTS = ("batching", "core", "data", "tasks")  # of this library, which preprocessors may run
_DEEPEST = 20
_PLAIN = (bool, int, float, str, type(None))


class Unknown(ValueError):
    """Something that cannot be described."""


def of_split(task: seqio.Task, split: str, settings: Mapping[str, Any]) -> str:
    """Returns the fingerprint of the tokens of a split, without the name of the task.

    Args:
        task, split: the task and the split.
        settings: other values that tokens depend on, such as length limits.

    Raises:
        Unknown: the task has something that cannot be described.
    """
    if not hasattr(task.source, "fingerprint"):
        raise Unknown(f"{type(task.source).__name__} has no method fingerprint")
    describer = _Describer()
    features = {
        name: [vocabulary_of(feature.vocabulary), feature.add_eos, str(feature.dtype)]
        for name, feature in task.output_features.items()
    }
    content = {
        "format": _FORMAT,
        "source": [describer.of(type(task.source)), task.source.fingerprint(split)],
        "preprocessors": [
            describer.of(step) for step in task.preprocessors if not isinstance(step, AddTaskId)
        ],
        "features": features,
        "settings": describer.of(settings),
    }
    content["code"] = code(describer.modules)
    return digest(content)


def describe(value: Any) -> Any:
    """Describes a value, with the code that it may run, as JSON values. Raises Unknown if that is
    not possible."""
    describer = _Describer()
    return [describer.of(value), code(describer.modules)]


def digest(content: Any) -> str:
    """Returns the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def vocabulary_of(vocabulary: Any) -> list[Any]:
    """Describes a vocabulary by its class, model and special ids."""
    model = getattr(vocabulary, "sp_model", None) or getattr(vocabulary, "identity", b"")
    special = [vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.extra_ids]
    size = vocabulary.vocab_size
    return [_name(type(vocabulary)), hashlib.sha256(model).hexdigest(), *special, size]


class _Describer:
    """Descriptions of values as JSON values.

    Attributes:
        modules: the names of the modules of all functions and classes so far.
    """

    def __init__(self):
        self.modules: set[str] = set()

    def of(self, value: Any, depth: int = 0) -> Any:
        """Describes a value. Raises Unknown if that is not possible."""
        if depth > _DEEPEST:
            raise Unknown("values are nested too deeply")
        if isinstance(value, _PLAIN):
            return value
        inner = functools.partial(self.of, depth=depth + 1)
        if isinstance(value, (list, tuple)):
            return [type(value).__name__, *map(inner, value)]
        if isinstance(value, Mapping):
            return {"mapping": [[inner(key), inner(x)] for key, x in value.items()]}
        if isinstance(value, (set, frozenset)):
            return {"set": sorted(json.dumps(inner(x)) for x in value)}
        if isinstance(value, (bytes, re.Pattern)):
            return [type(value).__name__, repr(value)]
        if isinstance(value, np.ndarray) and value.dtype != object:
            content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return ["array", str(value.dtype), list(value.shape), content]
        if isinstance(value, functools.partial):
            return ["partial", *map(inner, (value.func, value.args, value.keywords))]
        if isinstance(value, types.MethodType):
            return ["method", *map(inner, (value.__func__, value.__self__))]
        if isinstance(value, types.FunctionType):
            return self._function(value, inner)
        if isinstance(value, (type, types.BuiltinFunctionType)):
            self.modules.add(value.__module__ or "")
            return _name(value)
        return self._object(value, inner)

    def _function(self, function: types.FunctionType, inner: Any) -> Any:
        self.modules.add(function.__module__)
        if function.__module__.partition(".")[0] == _OWN:
            function = inspect.unwrap(function)  # of what checks types in tests
        cells = function.__closure__ or ()
        held = [function.__defaults__, function.__kwdefaults__, [x.cell_contents for x in cells]]
        return [_name(function), _of_code(function.__code__), *map(inner, held)]

    def _object(self, value: Any, inner: Any) -> Any:
        if dataclasses.is_dataclass(value):
            held = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
        elif type(value).__module__.partition(".")[0] in ("tensorflow", "numpy", "builtins"):
            raise Unknown(f"it holds {short(repr(value))}")
        elif hasattr(value, "__dict__"):
            held = vars(value)
        else:
            raise Unknown(f"it holds {short(repr(value))}")
        return [inner(type(value)), inner(held)]


def _name(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _of_code(found: types.CodeType) -> str:
    constants = [_of_constant(x) for x in found.co_consts]
    content = [found.co_code.hex(), constants, found.co_names, found.co_varnames]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _of_constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _of_code(value)
    # The order of a set differs between processes.
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


# --- The code of modules -------------------------------------------------------------------------


def code(modules: Iterable[str]) -> dict[str, str]:
    """Returns the version of each library, and the SHA-256 of each other module, that functions of
    these modules may run.

    Raises:
        Unknown: a module has no file.
    """
    found: dict[str, str] = {"python": sys.version}
    waiting = [*modules]
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        key = top if top == _OWN or _is_library(top) else name
        if key in found or top in sys.stdlib_module_names and top != "__main__":
            continue
        if top == _OWN:
            found[key] = _own_code()
        elif _is_library(top):
            found[key] = _version(top)
        else:
            content, imported = _read(name)
            found[key] = content
            waiting += imported
    return found


@functools.cache
def _own_code() -> str:
    root, hasher = Path(__file__).parents[1], hashlib.sha256()
    for part in _OWN_PARTS:
        for path in sorted((root / part).rglob("*.py")):
            hasher.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return hasher.hexdigest()


@functools.cache
def _is_library(top: str) -> bool:
    """Whether a top-level module is installed, so that its version says what it does."""
    path = getattr(sys.modules.get(top), "__file__", None) or ""
    return "site-packages" in Path(path).parts or "dist-packages" in Path(path).parts


@functools.cache
def _version(top: str) -> str:
    version = getattr(sys.modules[top], "__version__", None)
    if isinstance(version, str):
        return version
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return _read(top)[0]


def _read(name: str) -> tuple[str, list[str]]:
    """Returns the SHA-256 of a module's file, and the names of what it imports."""
    path = _path(name)
    if path is None:
        raise Unknown(f"the module {name} has no Python file")
    content, imported = path.read_bytes(), []
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            whole = importlib.util.resolve_name(relative, package)
            imported += [whole, *(f"{whole}.{alias.name}" for alias in node.names)]
    return hashlib.sha256(content).hexdigest(), [x for x in imported if _path(x) is not None]


def _path(name: str) -> Path | None:
    """Returns the file of a module, imported or not; None if there is no such Python file."""
    found = getattr(sys.modules.get(name), "__file__", None)
    if found is None and name not in sys.modules:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):  # a name that is no module
            return None
        found = spec and spec.origin
    return Path(found) if found and found.endswith(".py") else None
