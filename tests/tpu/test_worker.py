"""tpu/worker.sh: how a host runs a command and reports its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures.fake_gcloud import ROOT, Clouds

RUN = """
import os, signal, sys, time
print("started", *sys.argv[1:], flush=True)
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if "wait" in sys.argv:
    while True:
        time.sleep(0.05)
if "lost" in sys.argv:
    print("Terminating process because the JAX distributed service detected fatal errors.")
    sys.stdout.flush()
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
if {"lost", "abort"} & set(sys.argv):
    os.kill(os.getpid(), signal.SIGABRT)
sys.exit(int(sys.argv[1]))
"""

# `-m venv` copies the script, `-m pip` is recorded, everything else runs Python.
PYTHON = f"""#!/usr/bin/env bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$*" >>"$FAKES/pip" && [[ "$*" != *broken* ]] ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def host(tmp_path) -> Clouds:
    made = Clouds(tmp_path, present=("gcloud",))
    (made.bin / "cp").symlink_to("/bin/cp")
    for name in ("python3", "python3.12"):
        (made.bin / name).write_text(PYTHON)
        (made.bin / name).chmod(0o755)
    (tmp_path / "a_run.py").write_text(RUN)
    return made


def start(host: Clouds, *arguments: str, **environment: str) -> subprocess.Popen:
    folder = host.folder
    return subprocess.Popen(
        ["bash", str(ROOT / "tpu" / "worker.sh"), "a_run", *arguments],
        env={"PATH": str(host.bin), "FAKES": str(folder), "HOME": str(folder), "NAME": "mpt-1",
             "MPT_JAX_ROOT": str(folder / "bucket"), "PYTHONPATH": str(folder), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def until(path: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "arguments, code",
    [(["0"], 0), (["75"], 75), (["3"], 3), (["0", "lost"], 75), (["0", "abort"], 134),
     (["0", "deaf"], 75)],
    ids=["done", "saved", "failed", "another host was lost", "aborted", "stopped unawares"],
)  # fmt: skip
def test_worker_exits_like_its_run_and_uploads_log(host, arguments, code):
    child = start(host, *arguments)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == code, said
    name = os.uname().nodename
    assert said.splitlines()[-1] == f"worker {name} ends with {code}"
    assert "started" in said
    log = (host.folder / "bucket" / "logs" / "mpt-1" / f"{name}.log").read_text()
    assert f"started {' '.join(arguments)}\n" in log


def test_worker_abort_ignores_log_of_earlier_start(host):
    for argument, code in (("lost", 75), ("abort", 134)):
        child = start(host, "0", argument)
        said = child.communicate(timeout=60)[0]
        assert child.returncode == code, said


def test_worker_forwards_signal_and_run_saves(host):
    child = start(host, "0", "wait")
    until(host.folder / "mpt-jax" / "mpt-1" / "run.log", "started")
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 75 and "saved\n" in said


def test_worker_earlier_run_is_asked_to_save_first(host):
    log = host.folder / "mpt-jax" / "mpt-1" / "run.log"
    first = start(host, "0", "wait")
    until(log, "started")
    second = start(host, "0")
    said = second.communicate(timeout=60)[0]
    assert second.returncode == 0 and "Asking it to save" in said
    assert first.communicate(timeout=60)[0].splitlines()[-1].endswith("ends with 75")
    assert log.read_text() == "started 0 wait\nsaved\nstarted 0\n"


def test_worker_installs_package_once(host):
    source = "git+https://host/o/mpt-jax@abc"
    for package in (source, source, "gs://bucket/p/mpt_jax-1.whl"):
        child = start(host, "0", PACKAGE=package)
        assert child.communicate(timeout=60)[0] and child.returncode == 0
    home = host.folder / "mpt-jax" / "mpt-1"
    assert (host.folder / "pip").read_text().splitlines() == [
        f"-m pip install --quiet mpt-jax[tpu] @ {source}",
        f"-m pip install --quiet {home}/mpt_jax-1.whl[tpu]",
    ]
    copies = [call[1:] for call in host.calls()]
    assert copies == [["storage", "cp", "gs://bucket/p/mpt_jax-1.whl", f"{home}/"]]


def test_worker_failed_installation_in_last_line(host):
    child = start(host, "0", PACKAGE="git+https://host/o/broken@abc")
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 1
    assert said.splitlines()[-1] == f"worker {os.uname().nodename} could not be prepared: 1"
    assert not (host.folder / "mpt-jax" / "mpt-1" / "run.log").exists()


def test_worker_without_name_fails(host):
    child = start(host, "0", NAME="")
    assert "NAME" in child.communicate(timeout=60)[0] and child.returncode != 0
