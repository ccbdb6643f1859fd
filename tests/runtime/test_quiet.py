"""Start-up is silent, and nothing but known notices is hidden."""

from __future__ import annotations

import gc
import glob
import importlib.util
import os
import subprocess
import sys

import pytest

from mpt_jax.runtime import quiet
from tests.fixtures.processes import ROOT

NOTICES = [
    b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n",
    b"I0000 00:00:1795990277.448308    3013 port.cc:153] oneDNN custom operations are on.\n",
    b"W0000 00:00:1795985578.419341    2649 cpu_feature_guard.cc:227] This binary is optimized\n",
]


ERRORS = [
    b"E0000 00:00:1795985578.419341    2649 loader.cc:52] a library is missing\n",
    b"Unknown flag in XLA_FLAGS\n",
]


def test_without_notices_errors_and_other_lines_are_written(capfd):
    with quiet.without_notices():
        for line in (*NOTICES, *ERRORS):
            os.write(2, line)
    assert capfd.readouterr().err == b"".join(ERRORS).decode()


def test_without_notices_error_inside_restores_standard_error(capfd):
    with pytest.raises(ImportError), quiet.without_notices():
        os.write(2, b"why\n")
        raise ImportError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "why\nafter\n"


@pytest.mark.parametrize("enabled", [True, False])
def test_without_collection_keeps_garbage_until_later_and_restores_the_setting(enabled):
    collected = []
    record = lambda phase, info: collected.append(phase)  # noqa: E731
    gc.callbacks.append(record)
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), quiet.without_collection():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
        collected.clear()
        with quiet.without_collection():
            kept = [[] for _ in range(10 * gc.get_threshold()[0])]
        assert not collected and gc.get_freeze_count() > len(kept)
    finally:
        gc.callbacks.remove(record)
        gc.unfreeze()
        gc.enable()


@pytest.mark.skipif(
    any(map(glob.glob, quiet.ACCELERATORS)), reason="an accelerator's own notices may differ"
)
def test_import_of_tensorflow_and_jax_devices_prints_nothing():
    hidden = {*quiet.VARIABLES, "JAX_PLATFORMS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    code = "import mpt_jax, tensorflow, tensorflow_text, jax; print(jax.devices()[0].platform)"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert (ended.stdout, ended.stderr) == ("cpu\n", "")


@pytest.mark.parametrize(("level", "filters"), [("0", False), (None, True), ("3", True)])
def test_start_quietly_log_level_that_is_set_shows_everything(level, filters, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    if level is not None:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    quiet.start_quietly()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == (level or "3")
    assert bool(sys.meta_path) == filters
