"""Search for the learning rates of ATTEMPT and CrossPT on the toy suite (docs/study/protocol.md).

    python -m benchmarks.tune_crosspt [--root runs/tune] [--out docs/benchmarks/tune_crosspt.jsonl]

As in tune_demo: two target tasks and draws of examples that are reserved for tuning, k = 32, and
the validation split. It uses the shipped teachers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging

from benchmarks import figures
from benchmarks.tune_demo import SEEDS, SHOTS, TARGETS, VALIDATION
from mpt_jax.experiments.paper import suites, variants
from mpt_jax.experiments.paper.variants import Variant
from mpt_jax.experiments.stages import Stage, collect, target_bindings, target_runs
from mpt_jax.runtime import compilation_cache, paths

ATTEMPT_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
ATTENTION_RATES = (0.001, 0.01, 0.1, 1.0)
# Rates of CrossPT's sources. Private prompts and router follow the released code's ratio.
SOURCE_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
RATIO = (0.4, 1.0, 2.0)  # private prompts, sources, router


def grid() -> Iterator[tuple[Variant, tuple[float, ...]]]:
    """Yields each variant with its rates: (prompt, attention) or (private, sources, router)."""
    for rate in ATTEMPT_RATES:
        for attention in ATTENTION_RATES:
            yield variants.ATTEMPT_ARM, (rate, attention)
    for source in SOURCE_RATES:
        yield variants.CROSSPT_VARIANT, tuple(round(share * source, 6) for share in RATIO)


def stage(variant: Variant, rates: tuple[float, ...]) -> Stage:
    """Returns a stage with all runs (task x seed) of one variant at one setting."""
    suite = dataclasses.replace(suites.TOY, rates={variant.rate: rates})
    length = suite.length(TARGETS[0], variant, SHOTS)
    runs = target_runs(TARGETS, SEEDS, SHOTS)
    groups = "independent"
    if variant.joint:
        runs = tuple(sorted(runs, key=lambda run: run.seed))
        groups = [SEEDS.index(run.seed) for run in runs]
    start = [f'START_FROM = "{suite.sources[variant.start]}"'] if variant.start else []
    bindings = [
        *target_bindings(runs, length.rows, groups),
        *suite.rate_bindings(variant, SHOTS, length.steps),
        *start,
        VALIDATION,
    ]
    name = f"{variant.folder}/" + "_".join(map(str, rates))
    return Stage(name, (*variant.files, *suite.files), tuple(bindings), runs, length.steps)


def main() -> None:
    """Prints the mean validation score of each setting, and writes all to --out if given."""
    parser = argparse.ArgumentParser(description="Tunes ATTEMPT and CrossPT on the toy suite.")
    parser.add_argument("--root", type=Path, default=Path(paths.root()) / "tune")
    parser.add_argument("--out", type=Path, help="a JSONL file for the figures")
    parser.add_argument("--variants", nargs="*", help="names of variants; default all")
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    compilation_cache.enable()
    lines, means = [], {}
    for variant, rates in grid():
        if args.variants and variant.name not in args.variants:
            continue
        job = stage(variant, rates)
        if not job.is_done(args.root):
            job.run(args.root)
        result = collect(args.root, variant.name, SHOTS, [job])
        line = {
            "arm": variant.name,
            "rates": rates,
            "mean": round(float(np.mean(result.means())), 2),
            "scores": {task: found["accuracy"] for task, found in result.scores.items()},
            "seconds": round(result.seconds, 1),  # of training steps
        }
        lines.append(line)
        by_rate = means.setdefault(variant.name, {})
        by_rate[rates[0]] = max(line["mean"], by_rate.get(rates[0], line["mean"]))
        print(json.dumps(line), flush=True)
    for name, scores in means.items():
        print(f"{name}, first rate: {figures.best_of(scores)}")
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
