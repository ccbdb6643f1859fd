"""What every test runs under: checked shapes, no silent rank promotion, a warm compilation cache.

Tests see one CPU device. A test marked `devices(n)` is run again in a process of its own, where
XLA shows n virtual CPU devices; the others stay as fast as a single device is.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from unittest.mock import patch

# Before jax is imported anywhere: these are read once, here and by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tests compile much and compute little; the fixture `optimized` is for those that look at programs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "jax")
)
os.environ.setdefault(
    "MPT_JAX_TOKEN_CACHE", str(Path(__file__).resolve().parents[1] / ".cache" / "tokens")
)
# Small programs too: to load one takes a fifth of the time to compile it, and tests have thousands.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jaxlib
import jaxtyping
import pytest
from jaxtyping import _import_hook as import_hook

from tests.fixtures.processes import run_python

# Compile quickly: without fusion emitters in half the time, and a program in one piece, since other
# tests use the other cores. XLA reads its flags when it makes the first device, and ends a process
# that sets one it does not know.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if jaxlib.__version__.startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()

# Pytest imports it after this module, so the import hook below sees it.
pytest_plugins = ["tests.fixtures.pytest_fixtures"]

# Every annotated function of the library checks its shapes at run time, in tests only; not those of
# the task suites, where TensorFlow and SeqIO accept more than what they annotate.
LIBRARY = Path(__file__).resolve().parents[1] / "mpt_jax"
CHECKED = sorted(path.stem for path in LIBRARY.iterdir() if path.stem[0] != "_")
CHECKED.remove("tasks")


# The hook uses a separate bytecode cache. Unpatched, it does so for every import that a module of
# ours triggers, so each process would compile TensorFlow's sources again.
def _get_code(self, fullname):
    with patch(
        "importlib._bootstrap_external.cache_from_source",
        functools.partial(import_hook._optimized_cache_from_source, self._typechecker.get_hash()),
    ):
        return SourceFileLoader.get_code(self, fullname)


import_hook._JaxtypingLoader.get_code = _get_code
import_hook._JaxtypingLoader.exec_module = SourceFileLoader.exec_module
jaxtyping.install_import_hook([f"mpt_jax.{name}" for name in CHECKED], "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")


# Of a marked test's module: whether all its tests of as many devices passed in one child.
_passed: dict[tuple[Path, int], bool] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test marked `devices(n)` in a child that has n devices; True says it was run.

    The selected tests of a module share a child, since most of its time is imports. If it fails,
    each of them runs again by itself, to report its own failure.
    """
    count = devices_of(pyfuncitem)
    if count is None or jax.device_count() >= count:
        return None
    key = pyfuncitem.path, count
    if key not in _passed:
        beside = [item for item in pyfuncitem.session.items if item.path == pyfuncitem.path]
        names = [item.nodeid for item in beside if devices_of(item) == count]
        _passed[key] = run_with_devices(count, pyfuncitem.config.rootpath, names).returncode == 0
    if not _passed[key]:
        child = run_with_devices(count, pyfuncitem.config.rootpath, [pyfuncitem.nodeid])
        if child.returncode:
            pytest.fail(child.stdout[-8000:] + child.stderr[-4000:], pytrace=False)
    return True


def devices_of(item: pytest.Item) -> int | None:
    """The number of devices a test is marked to need."""
    marker = item.get_closest_marker("devices")
    return None if marker is None else marker.args[0]


def run_with_devices(count: int, root: Path, names: list[str]) -> CompletedProcess[str]:
    """Runs some tests in a process that sees a number of virtual CPU devices."""
    command = ["-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return run_python(*command, *names, cwd=root, check=False, XLA_FLAGS=flags, PYTEST_ADDOPTS="")


# --- Programs ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="session")
def networks_traced_once():
    """Models of equal networks share the trace of the network's random initialization, which most
    tests need only for its shapes."""
    models = {
        "mpt_jax.models.dual_encoder": "PromptedDualEncoder",
        "mpt_jax.models.encoder_decoder": "PromptedEncoderDecoder",
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, name in models.items():
            if module in sys.modules:  # tests of something else start without it
                cls = getattr(sys.modules[module], name)
                patch.setattr(cls, "init_backbone", traced_once(cls.init_backbone))
        yield


def traced_once(init_backbone):
    """Returns the same method, traced once for each network; calls with values are unchanged."""

    @functools.cache
    def compiled(cls, network):
        of = SimpleNamespace(module=network)
        return jax.jit(lambda key: init_backbone(of, key))

    def init(model, key):
        if isinstance(key, jax.core.Tracer):
            return compiled(type(model), model.module)(key)
        return init_backbone(model, key)

    return init


# --- Memory and time of the process that runs the tests -------------------------------------------

# Resident memory in bytes from which a process clears up between modules: half of the machine's,
# divided among the processes, within limits, since a container may have less than its machine.
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
CROWDED = max(3 << 29, min(5 << 29, MEMORY // (2 * PROCESSES)))
GROWTH = 1 << 29  # bytes that a process gains before it clears up again
_cleared = [0]  # resident memory after the last time
# Modules that take longest: they start first, or one process would end with them alone.
LONGEST = [
    *("test_train", "test_image_server", "test_datasets", "test_image_jobs", "test_image_teachers"),
    *("test_training_job", "test_eval_infer", "test_encoder_decoder", "test_command"),
    *("test_lane_jobs", "test_crosspt_model", "test_server", "test_export", "test_teacher_cache"),
    *("test_attempt", "test_processes", "test_classifier", "test_dual_encoder", "test_plan"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the modules that take longest first."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from going through what modules have imported: with TensorFlow
    and JAX loaded, that is a fifth of the time in which tests trace programs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Frees what a module has compiled, if the process holds much.

    The next modules trace and compile everything again. So a process waits until it has gained
    GROWTH, even if what it cannot free is above CROWDED.
    """
    is_last = nextitem is not None and nextitem.path != item.path
    if is_last and resident() > max(CROWDED, _cleared[0] + GROWTH):
        jax.clear_caches()
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        _cleared[0] = resident()


def resident() -> int:
    """Bytes of memory this process has now; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True, scope="session")
def freed_memory_is_returned():
    """Runs in this process would tell malloc to keep all memory for their next step."""
    from mpt_jax.runtime import malloc  # after the import hook

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(malloc, "keep_freed_memory", lambda: None)
        yield


@pytest.fixture(scope="module")
def optimized():
    """Programs of a module are compiled as they are outside tests, from this test on.

    For tests that count what programs do or take. One that was compiled before stays as it is.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
