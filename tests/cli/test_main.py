"""`mpt-jax` with a reader that stops reading, and with a wrong command."""

import os
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("module", ["mpt_jax", "mpt_jax.cli"])
def test_package_runs_as_the_command(module):
    command = [sys.executable, "-m", module, "gin-path"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert os.path.isfile(os.path.join(done.stdout.strip(), "gin", "mpt_source.gin"))
