"""`mpt-jax` with a reader that stops reading, and with a wrong command."""

import os
import subprocess
import sys

import pytest

from tests.fixtures.processes import ROOT, run_script

COMMAND = "import sys; from mpt_jax.cli import main; main.main()"


def run(arguments: list[str], stdout: int) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["tasks", "list"]])
def test_output_without_reader_exits_silently(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    assert run(arguments, writing) == (0, "")
    os.close(writing)


def test_unknown_command_error_lists_commands():
    code, errors = run(["tusks"], subprocess.DEVNULL)
    assert code == 1 and errors.startswith("mpt-jax: unknown command 'tusks'")
    assert "\n  tasks " in errors


def test_data_commands_import_nothing_from_their_folder(tmp_path):
    """A file beside downloaded weights, such as torch.py, must not run."""
    (tmp_path / "beside.py").touch()
    script = f"""
import importlib.util, runpy, sys
from mpt_jax.cli import main
runpy.run_module = lambda *args, **kwargs: None
path = [{str(ROOT)!r}, *sys.path[1:]]
for command in main.COMMANDS:
    sys.argv, sys.path[:] = ["mpt-jax", command], path
    importlib.invalidate_caches()
    main.main()
    if importlib.util.find_spec("beside"):
        print(command)
"""
    printed = run_script(script, cwd=tmp_path, PYTHONPATH=str(ROOT)).split()
    assert set(printed) == {"train", "eval", "infer", "plan", "tasks", "doctor"}


@pytest.mark.parametrize("module", ["mpt_jax", "mpt_jax.cli"])
def test_package_runs_as_the_command(module):
    command = [sys.executable, "-m", module, "gin-path"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert os.path.isfile(os.path.join(done.stdout.strip(), "gin", "mpt_source.gin"))
