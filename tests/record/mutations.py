"""Mutations of the source that the tests of the record's commit killed, run against today's tests.

    python tests/record/mutations.py [--tree FOLDER] [--only NUMBER ...]

Each entry of mutations.json changes a line that was drawn with a seed from the modules of that
commit (operators, constants, conditions), and that commit's tests of the module failed with it.
Each is made in a copy of the tree, and the tests named beside it must fail.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("mutations.json")


def copy_tree(tree: Path, to: Path) -> None:
    """Copies the tracked files of a working tree."""
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=tree, text=True).split("\0")
    for name in filter(None, files):
        if (tree / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((tree / name).read_bytes())


def is_killed(tree: Path, mutation: dict[str, Any]) -> bool:
    """Whether a tree's tests fail with a mutation; raises ValueError if its line is not there."""
    path = tree / mutation["file"]
    text = path.read_text()
    if text.splitlines().count(mutation["before"]) != 1:
        raise ValueError(f"{mutation['file']} has no single line {mutation['before'].strip()!r}.")
    try:
        path.write_text(text.replace(f"{mutation['before']}\n", f"{mutation['after']}\n"))
        command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation["tests"]]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        ended = subprocess.run(
            [sys.executable, *command], cwd=tree, env=environment, capture_output=True, check=False
        )
        return ended.returncode in (1, 2)  # a test failed, or a module cannot be imported
    finally:
        path.write_text(text)


def main() -> None:
    """Runs the mutations; exits with 1 if one survives."""
    parser = argparse.ArgumentParser(description="Runs recorded mutations against the tests.")
    parser.add_argument("--tree", type=Path, default=REPOSITORY)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER")
    args = parser.parse_args()
    mutations = json.loads(RECORD.read_text())
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        copy_tree(args.tree, tree)
        for number, mutation in enumerate(mutations):
            if args.only and number not in args.only:
                continue
            killed = is_killed(tree, mutation)
            survived += not killed
            outcome, line = "killed" if killed else "SURVIVED", mutation["after"].strip()
            print(f"{number:3} {outcome:9} {mutation['file']}: {line}", flush=True)
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
