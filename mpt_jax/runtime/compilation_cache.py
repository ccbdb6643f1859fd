"""JAX's persistent compilation cache, on by default.

A second start of the same job loads the programs that the first one compiled. The folder is
`JAX_COMPILATION_CACHE_DIR` if set (empty switches the cache off), else `~/.cache/mpt_jax/compiled`.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# A job has some fifty small programs. Loading one takes a fraction of the time to compile it.
MIN_SECONDS = 0.0


def enable() -> None:
    """Enables the cache, unless the user has configured it or its folder cannot be created."""
    if VARIABLE in os.environ or jax.config.jax_compilation_cache_dir:
        return
    folder = Path.home() / ".cache" / "mpt_jax" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # with a read-only home, train without a cache
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
