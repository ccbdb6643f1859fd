"""Claims of docs/t5x.md and tpu/requirements-t5x.txt."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pins() -> dict[str, str]:
    lines = (ROOT / "tpu" / "requirements-t5x.txt").read_text().splitlines()
    found = [re.match(r"([\w-]+)( @ git\+https|==)(.+)", line) for line in lines if line[0] != "#"]
    return {match[1].lower(): match[3] for match in found if match}


def test_t5x_requirements_pin_exact_versions_and_revisions():
    lines = (ROOT / "tpu" / "requirements-t5x.txt").read_text().splitlines()
    assert len(pins()) == sum(line[0] != "#" for line in lines) > 3
    for name in ("t5x", "airio", "jestimator"):
        assert re.fullmatch(r"://github\.com/[\w/-]+@[0-9a-f]{40}", pins()[name]), name


def test_t5x_requirements_exclude_own_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {re.split(r"[\[<>=; ]", line)[0].lower() for line in project["dependencies"]}
    assert not ours & set(pins())
    assert {"jax", "flax", "seqio"} <= ours


def test_t5x_docs_table_matches_recorded_members():
    """test_real_t5x.py compares the recorded table with T5X itself."""
    recorded = json.loads((ROOT / "tests" / "t5x_compat" / "touched.json").read_text())
    cells = {}
    for line in (
        (ROOT / "docs" / "t5x.md").read_text().partition("## What T5X touches")[2].splitlines()
    ):
        if line.startswith("| ") and "`" in line:
            kind, *columns = line.strip("| ").split(" | ")
            cells[kind] = [set(re.findall("`([^`]+)`", column)) for column in columns]
    reading = ("eval", "infer")
    assert cells == {
        kind: [set(names), {n for script in reading for n in recorded[script].get(kind, [])}]
        for kind, names in recorded["train"].items()
    }
