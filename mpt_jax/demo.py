"""The demo: MPT from teachers to new tasks on the toy suite, beside its baselines, in minutes.

    python -m mpt_jax.demo            what `make demo` runs
    python -m mpt_jax.demo --full     every target, k = 4, 16, 32 and full data, every method

It calls the same `train()` on the same gin files as the command line, one stage after another in
one process. What is compared, and how, was written down beforehand in docs/protocol.md.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import logging

from mpt_jax import compilation_cache, gin_utils, paths
from mpt_jax.demo_report import Result, write_report
from tasks import toy

SOURCES = ("toy_sst2", "toy_mnli", "toy_qnli", "toy_qqp", "toy_squad", "toy_record")
TARGETS = ("toy_boolq", "toy_cb", "toy_rte", "toy_mrpc")
ALL_TARGETS = (*TARGETS, "toy_wic", "toy_scitail", "toy_paws", "toy_d2t")
SEEDS = (0, 1, 2)
RESULTS = "results.json"
# The source prompt that PT starts from in the arm "PT from a source prompt": fixed, as in the
# SPoT baseline of the released ATTEMPT code.
START_TASK = "toy_mnli"
SOURCE_STEPS, SOURCE_RATE = 300, 0.3
# (steps, examples of each run in a step) of the target stages, for a few examples and for all.
FEW, ALL = (200, 4), (500, 16)


def one_rate(rate: float, steps: int) -> tuple[str, ...]:
    """Bindings for a peak learning rate, with a tenth of the steps as warmup."""
    return f"LEARNING_RATE = {rate}", f"WARMUP_STEPS = {steps // 10}"


def two_rates(rate: float, steps: int) -> tuple[str, ...]:
    """The same for MPT: the factors keep the paper's 4/3 of the shared prompt's rate. Its gin file
    warms up for a tenth, whatever the steps."""
    del steps
    return f"LEARNING_RATE = {rate}", f"TASK_LEARNING_RATE = {rate * 4 / 3:.6g}"


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to learn a new task.

    Attributes:
        name: in tables.
        gin_file: the stage file.
        learning_rate: the peak.
        schedule: (learning rate, steps) -> bindings.
        bindings: what else the demo sets beside the suite's defaults (gin/tiny.gin).
        seeds: draws of the training examples.
        grouped: all runs are one job; otherwise each is a job of its own.
    """

    name: str
    gin_file: str
    learning_rate: float
    schedule: Callable[[float, int], tuple[str, ...]] = one_rate
    bindings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    grouped: bool = True


def methods(root: Path) -> tuple[Method, ...]:
    """The methods compared; `root` holds the source stages. Their learning rates were chosen on
    other tasks (docs/protocol.md)."""
    start = (f"INITIAL_ARTEFACT = '{root}/pt_source/artefact'", f"START_FROM = '{START_TASK}'")
    tuned, finetuned = "gin/pt_target.gin", "gin/full_finetuning.gin"
    return (
        Method("PT", tuned, 0.3),
        Method("PT from a source prompt", tuned, 0.01, bindings=start),
        Method("MPT", "gin/mpt_target.gin", 0.3, two_rates),
        Method("Full fine-tuning", finetuned, 3e-4, seeds=(0,), grouped=False),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo and prints its table."""
    parser = argparse.ArgumentParser(prog="mpt-jax demo", description="MPT on the toy suite")
    parser.add_argument("--full", action="store_true", help="all targets, k = 4, 16, 32 and full")
    parser.add_argument("--root", default=os.path.join(paths.root(), "demo"), help="where to write")
    args = parser.parse_args(argv)
    gin_utils.log_progress()
    compilation_cache.enable()
    started = time.monotonic()
    root = Path(args.root)
    set_aside_finished(root)
    for stage in ("pt_source", "mpt_source"):
        bindings = [f"TRAIN_STEPS = {SOURCE_STEPS}", f"LEARNING_RATE = {SOURCE_RATE}"]
        run_stage(root, stage, f"gin/{stage}.gin", bindings)
    targets = ALL_TARGETS if args.full else TARGETS
    shots: tuple[int | None, ...] = (4, 16, 32, None) if args.full else (32,)
    results = [adapt(root, method, targets, k) for k in shots for method in methods(root)]
    seconds = time.monotonic() - started
    print(write_report(root, results, SOURCES, majority_shares(targets), seconds))
    (root / RESULTS).write_text(
        json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n"
    )


def set_aside_finished(root: Path) -> None:
    """Renames the folder of a demo that ran to its end, so that the next starts afresh; one that
    was interrupted goes on where it stopped."""
    if not (root / RESULTS).exists():
        return
    number = next(n for n in itertools.count(1) if not root.with_name(f"{root.name}.{n}").exists())
    root.rename(root.with_name(f"{root.name}.{number}"))
    logging.info("The demo before this one is kept in %s.%d.", root, number)


def run_stage(
    root: Path, name: str, gin_file: str, bindings: Sequence[str]
) -> Mapping[str, Mapping[str, float]]:
    """One stage with MODEL_DIR = root/name, scored once, on the test split, after its last step."""
    logging.info("=== %s", name)
    files = [gin_file, "gin/tiny.gin", "gin/runs/demo.gin"]
    return gin_utils.run_stage(files, [f"ROOT = '{root}'", f"STAGE = '{name}'", *bindings])


def adapt(
    root: Path,
    method: Method,
    targets: Sequence[str],
    shots: int | None,
    length: tuple[int, int] | None = None,
) -> Result:
    """All runs (target x seed) of one method.

    Args:
        root: holds the source stages.
        method: which.
        targets: task names.
        shots: training examples of each run; None for all.
        length: (steps, examples of each run in a step), if not the demo's.
    """
    runs = {
        (task, seed): task if shots is None else f"{task}_k{shots}_s{seed}"
        for task in targets
        for seed in (method.seeds if shots is not None else (0,))
    }
    jobs = [list(runs)] if method.grouped else [[run] for run in runs]
    folder = f"targets/{method.name.lower().replace(' ', '_')}_k{shots or 'all'}"
    steps, rows = length or (ALL if shots is None else FEW)
    started, scores, model_dirs = time.monotonic(), {}, []
    for job in jobs:
        name = folder if method.grouped else f"{folder}/{runs[job[0]]}"
        bindings = [
            f"TARGET_TASKS = {[task for task, _ in job]}",
            f"RUN_NAMES = {[runs[run] for run in job]}",
            "GROUPS = 'independent'",
            f"BATCH_SIZE = {rows * len(job)}",
            f"TRAIN_STEPS = {steps}",
            *method.schedule(method.learning_rate, steps),
            *method.bindings,
        ]
        scores |= run_stage(root, name, method.gin_file, bindings)
        model_dirs.append(str(root / name))
    by_task: dict[str, dict[str, list[float]]] = {}
    for (task, _), run in runs.items():
        for metric, value in scores[run].items():
            by_task.setdefault(task, {}).setdefault(metric, []).append(float(value))
    return Result(
        method.name,
        shots,
        by_task,
        _parameters(model_dirs[0], len(jobs[0])),
        time.monotonic() - started,
        tuple(model_dirs),
    )


def majority_shares(tasks: Sequence[str]) -> dict[str, float]:
    """Percent of each task's test rows that have the most frequent target."""
    shares = {}
    for task in tasks:
        counts = collections.Counter(target for _, target in toy.rows(task, "test"))
        shares[task] = 100 * counts.most_common(1)[0][1] / counts.total()
    return shares


def _parameters(model_dir: str, runs: int) -> float:
    """Trained parameters per run, from the run's own record."""
    record = json.loads((Path(model_dir) / "run.jsonl").read_text().splitlines()[-1])
    return record["trainable_parameters"] / runs


if __name__ == "__main__":
    main()
