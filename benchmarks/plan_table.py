"""Table of docs/tpu-planning.md: steps of several T5 sizes, compiled ahead of time for TPU slices.

    python -m benchmarks.plan_table [--out docs/benchmarks/plan.json] [--only t5_1_0_base]

Every row is one `mpt-jax plan` command, which is printed. Rows that are already in the file are not
compiled again, but figures derived from their counts and the chips' peaks are updated. Nothing is
run: the figures come from the TPU compiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mpt_jax.plan import format

TARGET, SOURCE = "gin/mpt_target.gin", "gin/mpt_source.gin"


@dataclasses.dataclass(frozen=True)
class Row:
    """A plan.

    Attributes:
        t5: the name of the model.
        topology: the TPU slice, such as `v5e:4x4`.
        rows: the examples in a step for each copy of the model.
        model_axis: the number of chips that hold one copy.
        stage: the gin file of the stage.
        step: `'train'`, `'eval'` or `'predict'`.
        dropout: the dropout rate.
    """

    t5: str
    topology: str
    rows: int
    model_axis: int = 1
    stage: str = TARGET
    step: str = "train"
    dropout: float = 0.0

    @property
    def batch(self) -> int:
        """Examples in a step on the whole slice."""
        chips = 1
        for size in self.topology.partition(":")[2].split("x"):
            chips *= int(size)
        return self.rows * chips // self.model_axis

    @property
    def command(self) -> list[str]:
        """Arguments of `python -m` for the plan."""
        return [
            "mpt_jax.plan",
            f"--gin_file={self.stage}",
            f"--gin.T5_NAME='{self.t5}'",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 256, 'targets': 16}",
            f"--gin.BATCH_SIZE={self.batch}",
            f"--gin.EVAL_BATCH_SIZE={self.batch}",
            f"--gin.DROPOUT_RATE={self.dropout}",
            f"--topology={self.topology}",
            f"--num_partitions={self.model_axis}",
            f"--steps={self.step}",
        ]


ROWS = (
    Row("t5_1_0_base", "v5e:4x4", 32),
    Row("t5_1_0_base", "v5e:4x4", 32, dropout=0.1),
    Row("t5_1_0_base", "v6e:2x4", 32),
    Row("t5_1_0_base", "v5e:4x4", 32, stage=SOURCE),
    Row("t5_1_0_base", "v5e:4x4", 32, stage=SOURCE, dropout=0.1),
    Row("t5_1_0_large", "v5e:4x4", 16),
    Row("t5_1_1_base", "v5e:4x4", 32),
    Row("t5_1_1_base", "v6e:2x4", 32),
    Row("t5_1_0_base", "v5p:2x2x1", 32),
    Row("t5_1_0_base", "v5e:4x4", 32, step="eval"),
    Row("t5_1_0_base", "v5e:4x4", 32, step="predict"),
    Row("t5_1_0_small", "v5e:2x2", 64),
    Row("t5_1_1_xl", "v5e:4x4", 8),
    Row("t5_1_1_xl", "v6e:2x4", 8),
    Row("t5_1_1_xxl", "v5e:4x4", 16, model_axis=4),
    Row("t5_1_1_xxl", "v5p:2x2x1", 8),
    Row("t5_1_0_large", "v6e:2x4", 16),
)


def main() -> None:
    """Compiles missing rows, writes all rows to --out, and prints the table."""
    parser = argparse.ArgumentParser(description="Compiles the table of docs/tpu-planning.md.")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/plan.json"))
    parser.add_argument("--only", help="compile only rows of this T5")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for row in ROWS:
        name = shlex.join(row.command)
        if name in found or arguments.only not in (None, row.t5):
            continue
        print(f"python -m {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "plan.json"
            given = [sys.executable, "-m", *row.command, f"--json={out}"]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            child = subprocess.run(given, env=dict(os.environ), check=False, **quiet)
            if child.returncode:
                sys.exit(child.stderr[-2000:])
            found[name] = dataclasses.asdict(row) | {"needs": json.loads(out.read_text())[0]}
        write(found, arguments.out)
    derive(found)
    write(found, arguments.out)
    print(table(ordered(found)))


def ordered(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the existing rows in the table's order."""
    names = [shlex.join(row.command) for row in ROWS]
    return [found[name] for name in names if name in found]


def derive(found: dict[str, Any]) -> None:
    """Updates the derived figures of every row in place."""
    for row in found.values():
        if "cost" in row["needs"]:
            row["needs"] |= format.derived(format.from_json(row["needs"]))


def write(found: dict[str, Any], out: Path) -> None:
    """Writes the rows as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table in Markdown."""
    head = (
        "T5", "slice", "data x model", "examples a copy", "step", "arguments", "temporaries",
        "peak", "TFLOP", "accessed", "HBM alone", "ms compute", "ms memory", "of ideal",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        needs = row["needs"]
        step = row["step"] if row["stage"] == TARGET else "train, distilled"
        step += f", dropout {row['dropout']}" if row["dropout"] else ""
        mesh = f"{needs['num_chips'] // row['model_axis']} x {row['model_axis']}"
        cells = [row["t5"], row["topology"], mesh, str(row["rows"]), step]
        if not needs["fits"] and "cost" not in needs:
            lines.append("| " + " | ".join([*cells, "does not fit"]) + " |" + " |" * 8)
            continue
        gib = [f"{needs[name] / 2**30:.2f}" for name in ("arguments", "temporaries", "peak")]
        cost = needs["cost"]
        cells += [f"{size} GiB" for size in gib]
        cells += [
            f"{cost['flops'] / 1e12:.2f}",
            f"{needs['accessed_bytes'] / 1e9:.1f} GB",
            f"{cost['hbm_bytes'] / 1e9:.1f} GB",
            f"{1e3 * needs['compute_seconds']:.1f}",
            f"{1e3 * needs['accessed_seconds']:.1f}",
            f"{needs['fraction_of_ideal']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
