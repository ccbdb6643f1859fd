"""What every test runs under: checked shapes, no silent rank promotion, a warm compilation cache.

Tests see one CPU device. A test marked `devices(n)` is run again in a process of its own, where
XLA shows n virtual CPU devices; the others stay as fast as a single device is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Before jax is imported anywhere: these are read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Pytest imports it after this module, so the import hook below sees it.
pytest_plugins = ["tests.fixtures.pytest_fixtures"]

# Every annotated function of the library checks its shapes at run time, in tests only.
jaxtyping.install_import_hook(["mpt_jax"], "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test marked `devices(n)` in a child that has n devices; True says it was run."""
    marker = pyfuncitem.get_closest_marker("devices")
    if marker is None or jax.device_count() >= marker.args[0]:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider"]
    child = subprocess.run(
        [*command, pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={marker.args[0]}",
        },
        capture_output=True,
        text=True,
    )
    if child.returncode:
        pytest.fail(child.stdout[-8000:] + child.stderr[-4000:], pytrace=False)
    return True
