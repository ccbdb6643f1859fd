"""Demo: all stages of MPT on the toy suite, with baselines for comparison, in minutes.

    mpt-jax demo            what `make demo` runs
    mpt-jax demo --full     every target, k = 4, 16, 32 and full data, every method
    mpt-jax demo --vision   images instead of texts (`image_demo`)

The demo runs its stages one after another in one process, with the same `train()` and gin files as
the command line. The comparison was specified in advance in docs/study/protocol.md.
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
from mpt_jax.experiments import image_demo, results
from mpt_jax.experiments.report import sections, tables
from mpt_jax.experiments.results import Result
from mpt_jax.experiments.stages import Run, Stage, collect, target_bindings, target_runs
from mpt_jax.runtime import compilation_cache, paths
from mpt_jax.tasks import toy

SOURCES = ("toy_sst2", "toy_mnli", "toy_qnli", "toy_qqp", "toy_squad", "toy_record")
TARGETS = ("toy_boolq", "toy_cb", "toy_rte", "toy_mrpc")
ALL_TARGETS = (*TARGETS, "toy_wic", "toy_scitail", "toy_paws", "toy_d2t")
SEEDS = (0, 1, 2)
# The source prompt that the variant "PT from a source prompt" starts from. It is fixed, as in the
# SPoT baseline of the released ATTEMPT code.
START_TASK = "toy_mnli"
SOURCE_STEPS, SOURCE_RATE = 300, 0.3
# (steps, examples of each run in a step) of the target stages: few-shot, and on all examples.
FEW, ALL = (200, 4), (500, 16)


def one_rate(rate: float, steps: int) -> tuple[str, ...]:
    """Returns the bindings for a peak learning rate and a warmup of a tenth of the steps."""
    return f"LEARNING_RATE = {rate}", f"WARMUP_STEPS = {steps // 10}"


def two_rates(rate: float, steps: int) -> tuple[str, ...]:
    """Returns the bindings for MPT's two peak learning rates. The rate of the task factors is 4/3
    of the shared prompt's, as in the paper. The gin file sets the warmup to a tenth of the
    steps."""
    del steps
    return f"LEARNING_RATE = {rate}", f"TASK_LEARNING_RATE = {rate * 4 / 3:.6g}"


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to adapt to a new task.

    Attributes:
        name: The name in tables.
        gin_files: The gin file of the target stage, then files that change its settings.
        learning_rate: The peak learning rate.
        schedule: Function from (learning rate, steps) to the bindings of the schedule.
        bindings: Further bindings, which override the suite's defaults (gin/tiny.gin).
        seeds: The draws of few-shot examples; each target has one run per draw. With all examples,
            each target has a single run.
        grouped: Whether one job trains all runs. Otherwise, each run is a separate job.
        start: The source task whose prompt initializes all prompts, if any.
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
    """Returns the methods to compare. `root` is the folder of the source stages. The learning rates
    were chosen on toy_wic and toy_paws (docs/study/protocol.md)."""
    start = (f"INITIAL_ARTIFACT = '{root}/pt_source/artifact'", f"START_FROM = '{START_TASK}'")
    tuned, finetuned = ("gin/pt_target.gin",), ("gin/full_finetuning.gin",)
    return (
        Method("PT", tuned, 0.3),
        Method("PT from a source prompt", tuned, 0.03, bindings=start, start=START_TASK),
        Method("MPT", ("gin/mpt_target.gin",), 0.3, two_rates),
        Method("Full fine-tuning", finetuned, 3e-4, seeds=(0,), grouped=False),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo, prints its tables, and writes its report and results.json."""
    parser = argparse.ArgumentParser(prog="mpt-jax demo", description="MPT on the toy suite")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="all targets, k = 4, 16, 32 and full")
    which.add_argument("--vision", action="store_true", help="MVLPT on images of the small world")
    parser.add_argument("--root", help="output folder; default MPT_JAX_ROOT/demo or demo_vision")
    args = parser.parse_args(argv)
    name = "demo_vision" if args.vision else "demo"
    root = Path(args.root or os.path.join(paths.root(), name))
    gin_utils.log_progress()
    compilation_cache.enable()
    set_aside_finished(root)
    if args.vision:
        image_demo.run(root)
        return
    started = time.monotonic()
    train_sources(root)
    targets = ALL_TARGETS if args.full else TARGETS
    shots: tuple[int | None, ...] = (4, 16, 32, None) if args.full else (32,)
    collected = [adapt(root, method, targets, k) for k in shots for method in methods(root)]
    seconds = time.monotonic() - started
    shares = majority_shares(targets)
    print(f"\n{tables.text(root, collected, shares)}\n")
    print(f"Everything took {seconds:.0f} s. Artifacts and predictions: {root}")
    print(f"Report: {sections.write(root, collected, majority=shares)}")
    results.save(root, collected, shares)


def train_sources(root: Path) -> None:
    """Runs the teachers and the source stage, unless they are finished."""
    for name in ("pt_source", "mpt_source"):
        source = stage(name, [f"gin/{name}.gin"], [f"LEARNING_RATE = {SOURCE_RATE}"])
        if not source.is_done(root):
            source.run(root)


def set_aside_finished(root: Path) -> None:
    """Renames the folder of a finished demo, so that the next demo starts from scratch. The folder
    of an interrupted demo is kept, so that the next demo resumes it."""
    if not (root / results.FILE).exists():
        return
    number = next(n for n in itertools.count(1) if not root.with_name(f"{root.name}.{n}").exists())
    root.rename(root.with_name(f"{root.name}.{number}"))
    logging.info("Moved the previous demo to %s.%d.", root, number)


def stage(
    name: str,
    gin_files: Sequence[str],
    bindings: Sequence[str],
    runs: tuple[Run, ...] = (),
    steps: int = SOURCE_STEPS,
) -> Stage:
    """Returns a stage of the demo. It is evaluated only after its last step, on the test split."""
    files = (*gin_files, "gin/tiny.gin", "gin/runs/demo.gin")
    return Stage(name, files, tuple(bindings), runs, steps, sets_root=True)


def adapt(
    root: Path,
    method: Method,
    targets: Sequence[str],
    shots: int | None,
    length: tuple[int, int] | None = None,
) -> Result:
    """Runs all adaptations (target x seed) of one method, and returns their scores.

    Args:
        root: The demo's folder, which contains the source stages.
        method: The method to run.
        targets: The names of the target tasks.
        shots: The number of training examples of each run; None for all.
        length: (steps, examples of each run in a step); None for the demo's defaults.
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
        jobs.append(stage(name, method.gin_files, bindings, job, steps))
    started = time.monotonic()
    for job in jobs:
        if not job.is_done(root):
            job.run(root)
    seconds = time.monotonic() - started
    result = collect(root, method.name, shots, jobs, start=method.start)
    return dataclasses.replace(result, seconds=seconds)


def majority_shares(tasks: Sequence[str]) -> dict[str, float]:
    """Returns the majority-class share of each task's test split, in percent."""
    targets = {task: [target for _, target in toy.rows(task, "test")] for task in tasks}
    return {task: results.majority_share(targets[task]) for task in tasks}


if __name__ == "__main__":
    main()
