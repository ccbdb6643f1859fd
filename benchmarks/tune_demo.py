"""Search for the demo's learning rates, on data it does not report (docs/study/protocol.md).

    python -m benchmarks.tune_demo [--root runs/tune] [--out docs/benchmarks/tune_demo.jsonl]

It uses two target tasks and draws of training examples that are reserved for tuning, and the
validation split. Every prompt method gets the same grid. Full fine-tuning gets a grid three orders
of magnitude lower. The source stages must be in --root (for example, copies of the demo's pt_source
and mpt_source folders).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from absl import logging

from benchmarks import figures
from mpt_jax.experiments import demo
from mpt_jax.runtime import compilation_cache, paths

TARGETS = ("toy_wic", "toy_paws")
SEEDS = (100, 101, 102, 103, 104)
SHOTS = 32
PROMPT_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FULL_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
# Ablation variants whose best learning rate may differ from MPT's (docs/study/results-toy.md).
ABLATIONS = (
    demo.Method(
        "MPT, shared prompt only",
        ("gin/mpt_target.gin", "gin/ablations/target_shared_only.gin"),
        0.3,
        lambda rate, steps: (f"LEARNING_RATE = {rate}",),
    ),
    demo.Method(
        "MPT, vectors only",
        ("gin/mpt_target.gin", "gin/ablations/target_vectors_only.gin"),
        0.3,
        demo.two_rates,
    ),
)
VALIDATION = "infer_eval/utils.DatasetConfig.split = 'validation'"


def main() -> None:
    """Prints each method's mean validation score at each rate and number of steps, and writes all
    to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, default=Path(paths.root()) / "tune")
    parser.add_argument("--out", type=Path, help="a JSONL file for the figures")
    parser.add_argument("--methods", nargs="*", help="names of methods; default all")
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[demo.FEW[0]], help="lengths to try"
    )
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    compilation_cache.enable()
    lines = []
    for method in (*demo.methods(args.root), *ABLATIONS):
        if args.methods and method.name not in args.methods:
            continue
        for steps in args.steps:
            means = {}
            for rate in PROMPT_RATES if method.grouped else FULL_RATES:
                tried = dataclasses.replace(
                    method,
                    name=f"{method.name} lr {rate} steps {steps}",
                    learning_rate=rate,
                    bindings=(*method.bindings, VALIDATION),
                    seeds=SEEDS if method.grouped else SEEDS[:1],
                )
                result = demo.adapt(args.root, tried, TARGETS, SHOTS, (steps, demo.FEW[1]))
                scores = {
                    task: [round(value, 2) for value in found["accuracy"]]
                    for task, found in result.scores.items()
                }
                mean = round(float(np.mean([np.mean(found) for found in scores.values()])), 2)
                lines.append({"method": method.name, "learning_rate": rate, "steps": steps})
                lines[-1] |= {
                    "mean": mean,
                    "scores": scores,
                    "seconds": round(result.seconds, 1),
                }
                means[rate] = mean
                print(json.dumps(lines[-1]), flush=True)
            print(f"{method.name}, {steps} steps: {figures.best_of(means)}")
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
