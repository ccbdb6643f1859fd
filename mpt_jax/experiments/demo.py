"""The demo: MPT from teachers to new tasks on the toy suite, beside its baselines, in minutes.

    mpt-jax demo            what `make demo` runs
    mpt-jax demo --full     every target, k = 4, 16, 32 and full data, every method

It calls the same `train()` on the same gin files as the command line, one stage after another in
one process. What is compared, and how, was written down beforehand in docs/protocol.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import logging

from mpt_jax.config import gin_utils
from mpt_jax.experiments import results
from mpt_jax.experiments.report import sections, tables
from mpt_jax.experiments.results import Result
from mpt_jax.experiments.stages import Run, Stage, collect, quoted, target_bindings, target_runs
from mpt_jax.runtime import compilation_cache, paths
from mpt_jax.tasks import toy

SOURCES = ("toy_sst2", "toy_mnli", "toy_qnli", "toy_qqp", "toy_squad", "toy_record")
TARGETS = ("toy_boolq", "toy_cb", "toy_rte", "toy_mrpc")
ALL_TARGETS = (*TARGETS, "toy_wic", "toy_scitail", "toy_paws", "toy_d2t")
SEEDS = (0, 1, 2)
# The source prompt that PT starts from in the variant "PT from a source prompt": fixed, as in the
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
        gin_files: the stage file, and what changes it.
        learning_rate: the peak.
        schedule: (learning rate, steps) -> bindings.
        bindings: what else the demo sets beside the suite's defaults (gin/tiny.gin).
        seeds: draws of the training examples.
        grouped: all runs are one job; otherwise each is a job of its own.
        start: the source task that prompts start from, if it is one.
    """

    name: str
    gin_files: tuple[str, ...]
    learning_rate: float
    schedule: Callable[[float, int], tuple[str, ...]] = one_rate
    bindings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    grouped: bool = True
    start: str | None = None


def methods(root: Path) -> tuple[Method, ...]:
    """The methods compared; `root` holds the source stages. Their learning rates were chosen on
    other tasks (docs/protocol.md)."""
    start = (f"INITIAL_ARTIFACT = '{root}/pt_source/artifact'", f"START_FROM = '{START_TASK}'")
    tuned, finetuned = ("gin/pt_target.gin",), ("gin/full_finetuning.gin",)
    return (
        Method("PT", tuned, 0.3),
        Method("PT from a source prompt", tuned, 0.01, bindings=start, start=START_TASK),
        Method("MPT", ("gin/mpt_target.gin",), 0.3, two_rates),
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
    for name in ("pt_source", "mpt_source"):
        source = stage(root, name, [f"gin/{name}.gin"], [f"LEARNING_RATE = {SOURCE_RATE}"])
        if not source.is_done(root):
            source.run(root)
    targets = ALL_TARGETS if args.full else TARGETS
    shots: tuple[int | None, ...] = (4, 16, 32, None) if args.full else (32,)
    found = [adapt(root, method, targets, k) for k in shots for method in methods(root)]
    seconds = time.monotonic() - started
    shares = majority_shares(targets)
    print(f"\n{tables.text(root, found, shares)}\n")
    print(f"Everything took {seconds:.0f} s. Artifacts and predictions: {root}")
    print(f"Report: {sections.write(root, found, majority=shares)}")
    results.save(root, found, shares)


def set_aside_finished(root: Path) -> None:
    """Renames the folder of a demo that ran to its end, so that the next starts afresh; one that
    was interrupted goes on where it stopped."""
    if not (root / results.FILE).exists():
        return
    number = next(n for n in itertools.count(1) if not root.with_name(f"{root.name}.{n}").exists())
    root.rename(root.with_name(f"{root.name}.{number}"))
    logging.info("The demo before this one is kept in %s.%d.", root, number)


def stage(
    root: Path,
    name: str,
    gin_files: Sequence[str],
    bindings: Sequence[str],
    runs: tuple[Run, ...] = (),
    steps: int = SOURCE_STEPS,
) -> Stage:
    """A stage of the demo, scored once, on the test split, after its last step."""
    files = (*gin_files, "gin/tiny.gin", "gin/runs/demo.gin")
    # What an earlier stage left is looked for below the root.
    return Stage(name, files, (f"ROOT = {quoted(str(root))}", *bindings), runs, steps)


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
    runs = target_runs(targets, method.seeds if shots is not None else (0,), shots)
    folder = f"targets/{method.name.lower().replace(' ', '_')}_k{shots or 'all'}"
    steps, rows = length or (ALL if shots is None else FEW)
    jobs = []
    for job in [runs] if method.grouped else [(run,) for run in runs]:
        bindings = [
            *target_bindings(job, rows),
            *method.schedule(method.learning_rate, steps),
            *method.bindings,
        ]
        name = folder if method.grouped else f"{folder}/{job[0].name}"
        jobs.append(stage(root, name, method.gin_files, bindings, job, steps))
    started = time.monotonic()
    for job in jobs:
        if not job.is_done(root):
            job.run(root)
    seconds = time.monotonic() - started
    result = collect(root, method.name, shots, jobs, start=method.start)
    return dataclasses.replace(result, seconds=seconds)


def majority_shares(tasks: Sequence[str]) -> dict[str, float]:
    """Percent of each task's test rows that have the most frequent target."""
    targets = {task: [target for _, target in toy.rows(task, "test")] for task in tasks}
    return {task: results.majority_share(targets[task]) for task in tasks}


if __name__ == "__main__":
    main()
