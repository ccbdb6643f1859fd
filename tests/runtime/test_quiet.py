"""Start-up is silent, and nothing but known notices is hidden."""

from __future__ import annotations

import glob
import os
import subprocess
import sys

import pytest

from mpt_jax.runtime import quiet
from tests.fixtures.processes import ROOT

NOTICES = [
    b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n",
    b"I0000 00:00:1795990277.448308    3013 port.cc:153] oneDNN custom operations are on.\n",
    b"E0000 00:00:1795985578.419341    2649 cuda_platform.cc:52] failed call to cuInit\n",
]


def test_without_notices_other_lines_are_written(capfd):
    with quiet.without_notices():
        for line in (*NOTICES, b"Unknown flag in XLA_FLAGS\n"):
            os.write(2, line)
    assert capfd.readouterr().err == "Unknown flag in XLA_FLAGS\n"


def test_without_notices_error_inside_restores_standard_error(capfd):
    with pytest.raises(ImportError), quiet.without_notices():
        os.write(2, b"why\n")
        raise ImportError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "why\nafter\n"


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


def test_start_quietly_keeps_variables_that_are_set(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    quiet.start_quietly()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
