"""The table of accelerators is consistent, and the scripts pass shellcheck."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TPU = Path(__file__).parents[2] / "tpu"
ROWS = [
    line.split() for line in (TPU / "topologies.txt").read_text().splitlines() if line[0] != "#"
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_topology_row_is_consistent(row):
    name, accelerator, topology, hosts, chips, machine, runtime = row
    total = math.prod(int(side) for side in topology.split("x"))
    assert total == int(hosts) * int(chips)
    # Names of v4 and v5p count TensorCores, two per chip.
    generation, count = name.rsplit("-", 1)
    assert int(count) == total * (2 if generation in ("v4", "v5p") else 1)
    assert machine.endswith(f"-{chips}t")
    spelt = {"v5litepod": "v5-lite", "v4": "v4", "v5p": "v5p", "v6e": "v6e"}[generation]
    assert accelerator.startswith(f"tpu-{spelt}-")
    assert len(topology.split("x")) == (3 if generation in ("v4", "v5p") else 2)
    assert int(chips) in (1, 4, 8) and (int(hosts) == 1 or chips == "4")


def test_topology_types_are_unique():
    names = [row[0] for row in ROWS]
    assert len(names) == len(set(names))
    assert {"v5litepod-16", "v5p-8", "v6e-8"} <= set(names)


def test_tpu_scripts_pass_shellcheck():
    found = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    scripts = sorted(str(path.relative_to(TPU.parent)) for path in TPU.glob("*.sh"))
    assert len(scripts) == 5
    child = subprocess.run(
        [found, "--external-sources", *scripts], cwd=TPU.parent, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr
