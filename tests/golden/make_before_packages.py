"""Writes before_packages/: MODEL_DIRs that the version of flat modules left half-way.

    python tests/golden/make_before_packages.py

Later versions go on with them and serve their prompts (`python tests/record/behavior.py check`);
they are never written again. TensorBoard's files are left out, and what names the machine.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "record"))
from behavior import FIXTURES, FLEET, TARGET, Place  # noqa: E402

RUNS = {"mpt_target": ("mpt_target tiny", TARGET), "fleet": ("mpt_target tiny runs/fleet", FLEET)}


def main() -> None:
    """Trains each to step 4 of its 8."""
    for name, (files, bindings) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder).resolve()
            place = Place(here, [], here / "cache")
            place.stage("train", files, **bindings, train__total_steps=4)
            keep(here / "runs" / "tiny" / "mpt_target", FIXTURES / name, str(here))


def keep(source: Path, target: Path, here: str) -> None:
    """Copies a MODEL_DIR without what is of a machine."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("events.out.tfevents*"))
    for path in target.rglob("commit_success.txt"):
        path.write_text(path.read_text().replace(f"{here}/", ""))
    path = target / "run.jsonl"
    start = json.loads(path.read_text())
    start |= {"platform": "Linux", "command": ["mpt_jax/train.py", *start["command"][1:]]}
    path.write_text(json.dumps(start) + "\n")


if __name__ == "__main__":
    main()
