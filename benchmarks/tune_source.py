"""Search for the learning rate of MPT's factors in the source stage, on data that no table reports.

    python -m benchmarks.tune_source [--root FOLDER] [--out docs/benchmarks/tune_source.json]

The teachers are trained once. For every rate, the demo's source stage runs with it, and two target
tasks that are reserved for tuning start from its prompts (docs/study/protocol.md), once from the
averages of the factors and once from the average of the products. The rule: take the rate with the
best mean validation score when targets start from the averages of the factors, as in the paper; if
that is the first or last of the grid, extend the grid.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from benchmarks import figures
from benchmarks.tune_demo import SHOTS, TARGETS, VALIDATION
from mpt_jax.experiments import demo
from mpt_jax.runtime import compilation_cache, paths

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SEEDS = tuple(range(100, 110))  # draws that are reserved for tuning
AVERAGES = ("factors", "products")


def main() -> None:
    """Prints the mean validation score of every rate and average, and writes all to --out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, default=Path(paths.root()) / "tune_source")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    compilation_cache.enable()
    teachers = demo.stage("pt_source", ["gin/pt_source.gin"], ["LEARNING_RATE = 0.3"])
    if not teachers.is_done(args.root):
        teachers.run(args.root)
    lines = [line for rate in args.rates for line in tried(args.root, rate)]
    means = {line["rate"]: line["mean"] for line in lines if line["average_of"] == "factors"}
    print(figures.best_of(means))
    if args.out:
        args.out.write_text(json.dumps({"rates": lines}, indent=1) + "\n")


def tried(root: Path, rate: float) -> list[dict[str, Any]]:
    """Returns the scores of targets after a source stage with this rate, for both averages."""
    folder = root / f"rate_{rate}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pt_source").exists():
        os.symlink((root / "pt_source").resolve(), folder / "pt_source")
    bindings = ["LEARNING_RATE = 0.3", f"TASK_LEARNING_RATE = {rate}"]
    source = demo.stage("mpt_source", ["gin/mpt_source.gin"], bindings)
    if not source.is_done(folder):
        source.run(folder)
    metrics = (folder / "mpt_source" / "metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, metrics) if line["folder"] == "prompt"][-1]
    statistics = {name: x for name, x in found.items() if name not in ("folder", "step")}
    (mpt,) = (method for method in demo.methods(folder) if method.name == "MPT")
    lines = []
    for average in AVERAGES:
        method = dataclasses.replace(
            mpt,
            name=f"MPT from {average}",
            bindings=(VALIDATION, f"AVERAGE_OF = '{average}'"),
            seeds=SEEDS,
        )
        of_task = demo.adapt(folder, method, TARGETS, SHOTS).scores
        scores = {task: of_task[task]["accuracy"] for task in TARGETS}
        mean = round(float(np.mean([np.mean(each) for each in scores.values()])), 2)
        lines.append({"rate": rate, "average_of": average, "mean": mean, "scores": scores})
        shown = ", ".join(f"{name} {value:.3g}" for name, value in statistics.items())
        print(f"rate {rate}, average of {average}: {mean} ({shown})", flush=True)
    lines[0]["statistics"] = statistics
    return lines


if __name__ == "__main__":
    main()
