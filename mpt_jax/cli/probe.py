"""Probes for `mpt-jax doctor`, which neither hang nor import packages into its process."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mpt_jax.config import trainer_choice

SISTERS = ("airio", "jestimator")  # installed from git along with T5X, with more requirements


class Probe:
    """A Python script in a child process, which is killed after a timeout.

    Args:
        script: The Python source to run.
        arguments: The script's arguments, `sys.argv[1:]`.
    """

    def __init__(self, script: str, *arguments: str):
        self._child = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def answer(self, seconds: float) -> tuple[str, str]:
        """Waits for the script, and returns (last line of its output, '') if it succeeded,
        ('', last line of its errors) if it failed, or ('', '') after `seconds`."""
        try:
            output, errors = self._child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._kill()
            return "", ""
        if self._child.returncode == 0:
            return output.strip().splitlines()[-1] if output.strip() else "done", ""
        return "", (errors.strip().splitlines() or ["no message"])[-1]

    def _kill(self) -> None:
        self._child.kill()
        for pipe in (self._child.stdout, self._child.stderr):
            assert pipe is not None
            pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1)  # a process inside a driver may die late, or never


def missing_packages(t5x: Path) -> set[str]:
    """Returns the packages that T5X's scripts need but that are not installed.

    Nothing is imported. Imports are found by parsing the scripts, and the files that they import
    from T5X and its sister packages.
    """
    folders: dict[str, Path] = {"t5x": t5x}
    waiting = [f"t5x.{name}" for name in trainer_choice.SCRIPTS]
    seen, missing = set(waiting), set()
    while waiting:
        package, *inside = waiting.pop().split(".")
        if package not in folders:
            spec = None if package in sys.stdlib_module_names else importlib.util.find_spec(package)
            if spec is None and package not in sys.stdlib_module_names:
                missing.add(package)
            if spec is None or package not in SISTERS or not spec.submodule_search_locations:
                continue
            folders[package] = Path(spec.submodule_search_locations[0])
        stem = folders[package].joinpath(*inside)
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            new = set(_imported(path)) - seen if path.is_file() else set()
            seen |= new
            waiting += new
    return missing


def _imported(path: Path) -> Iterator[str]:
    """Yields the modules that a file imports absolutely, at its top level or under
    `if __name__ == ...`."""
    body = ast.parse(path.read_text()).body
    for node in list(body):
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            body += node.body
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
