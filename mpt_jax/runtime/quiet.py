"""Quiet imports of TensorFlow and JAX, without garbage collection while TensorFlow loads.

C++ libraries print notices that no user can act on while they are loaded, before a program can
configure logging. Python's garbage collector reads all objects of the imported packages again and
again, although they stay until the process ends; this takes a fifth of the time of imports.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from typing import Any

VARIABLES = {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR"}
# Packages whose libraries print when they are loaded.
NOISY = ("tensorflow", "tensorflow_text")
NOTICE = re.compile(
    rb"(WARNING: All log messages before absl::InitializeLog\(\)"
    rb"|[IW]\d{4} [\d:. ]+\S+:\d+\]"  # glog: severity, date, time, process, file and line
    rb"|To enable the following instructions:)"
)
ACCELERATORS = (
    "/dev/accel*",
    "/dev/vfio/[0-9]*",
    "/dev/nvidia*",
    "/dev/dxg",
    "/dev/kfd",
    "/dev/dri/render*",
)


def start_quietly() -> None:
    """Suppresses start-up notices; call it before TensorFlow and JAX are imported.

    If TF_CPP_MIN_LOG_LEVEL is already set to a level other than 3, that level applies, and
    TensorFlow's messages are not filtered. On a machine with libtpu but no accelerator,
    JAX_PLATFORMS defaults to cpu; otherwise libtpu would search for a TPU and print many messages.
    """
    level = VARIABLES["TF_CPP_MIN_LOG_LEVEL"]  # as inherited from a process of this library
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", level) == level:
        sys.meta_path.insert(0, _QuietImports())
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    # Matplotlib warns if HOME is not writable, which does not affect its figures.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if sys.platform == "linux" and importlib.util.find_spec("libtpu"):
        if not any(map(glob.glob, ACCELERATORS)):
            os.environ.setdefault("JAX_PLATFORMS", "cpu")


class _QuietImports(importlib.abc.MetaPathFinder):
    """Import hook that filters standard error and stops garbage collection while a package of
    `NOISY` is loaded."""

    def find_spec(
        self, name: str, path: Any, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of a noisy package, with a quiet loader; None for other packages."""
        if name not in NOISY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_quietly(module: types.ModuleType) -> None:
                with without_notices(), without_collection():
                    load(module)

            spec.loader.exec_module = exec_quietly  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Collects standard error while the block runs, then writes it without the notices."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                if not NOTICE.match(line):
                    os.write(2, line)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Stops garbage collection while the block runs. Later collections leave out all objects that
    exist at the end of the block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
