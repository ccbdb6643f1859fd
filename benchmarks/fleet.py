"""Run time of a fleet of few-shot adaptations, compared with as many single-run jobs.

    python -m benchmarks.fleet --out docs/benchmarks/fleet.json
    python -m benchmarks.fleet --suite images --sizes 1 32 --out docs/benchmarks/fleet_images.json

MPT's target stage on the toy suite as in the demo (gin/runs/demo.gin): every run trains on 32
examples for 200 steps of 4 examples, and is not evaluated. Or CoOp on the small image world
(gin/tiny_vision.gin) with cached features of images: every run trains on 5 images of each class
for 200 steps of 16 images. A fleet is one such command with n runs
in independent groups, so it takes the same steps on the same examples. It is compared with n
processes one after another ("cold"; all but the first load the compiled step from JAX's cache on
disk), and with n stages one after another in a process that has run one before ("warm"; the step is
already compiled). These are measured one run at a time and multiplied by n. A fleet has a separate
process without a compiled step. All take turns. Figures are median wall seconds from start to end.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import contest, figures
from mpt_jax.config import gin_utils
from mpt_jax.experiments import demo, results
from mpt_jax.experiments.stages import Run, Stage, target_bindings
from mpt_jax.runtime import compilation_cache
from mpt_jax.tasks.few_shot import Draw

STEPS = demo.FEW[0]
COLD, WARM = "cold", "warm"


class Suite(NamedTuple):
    """What runs train on.

    Attributes:
        files: the gin files.
        tasks: the names of four tasks.
        shots: the number of training examples, of each class if `per_class`.
        rows: the examples of a run in a step.
        per_class: whether shots are those of each class.
    """

    files: tuple[str, ...]
    tasks: tuple[str, ...]
    shots: int
    rows: int
    per_class: bool = False


SUITES = {
    "text": Suite(
        ("gin/mpt_target.gin", "gin/tiny.gin", "gin/runs/demo.gin"),
        tuple(demo.TARGETS),
        shots=32,
        rows=int(demo.FEW[1]),
    ),
    "images": Suite(
        ("gin/coop_target.gin", "gin/tiny_vision.gin", "gin/runs/image_cache.gin"),
        ("toy_tint", "toy_digits", "toy_outline", "toy_gray_texture"),
        shots=5,
        rows=16,
        per_class=True,
    ),
}


def fleet_runs(number: int, suite: Suite = SUITES["text"]) -> tuple[Run, ...]:
    """Returns the runs of a fleet: the suite's four tasks, each with as many draws as needed. A
    fleet of fewer than four runs has one run for each of the first tasks.

    Raises:
        ValueError: `number` is greater than four and not a multiple of four.
    """
    tasks = suite.tasks[:number]
    if number % len(tasks):
        raise ValueError(
            f"A fleet of {number} runs cannot have equally many draws of {len(tasks)} tasks. "
            f"Set --sizes to multiples of {len(suite.tasks)}, or to fewer than "
            f"{len(suite.tasks)} runs."
        )
    draws = (
        Draw(task, suite.shots, seed, suite.per_class)
        for task in tasks
        for seed in range(number // len(tasks))
    )
    return tuple(Run(draw.task, draw.seed, draw.name) for draw in draws)


def stage(name: str, runs: Sequence[Run], steps: int, suite: Suite) -> Stage:
    """Returns a stage that only trains these runs. Its ROOT has no source stage, so runs of texts
    start from the shipped one."""
    bindings = (
        *target_bindings(runs, suite.rows),
        "train_script.train.train_eval_dataset_cfg = None",
        "train_script.train.infer_eval_dataset_cfg = None",
        "train_script.train.actions = {}",
    )
    return Stage(name, suite.files, bindings, tuple(runs), steps, sets_root=True)


def stages(name: str, number: int, steps: int, suite: Suite = SUITES["text"]) -> Iterator[Stage]:
    """Yields stages with new names and `number` runs each. Single runs cycle through the
    targets."""
    singles = itertools.cycle(fleet_runs(len(suite.tasks), suite))
    for turn in itertools.count():
        runs = [next(singles)] if number == 1 else fleet_runs(number, suite)
        yield stage(f"{name}_{turn}", runs, steps, suite)


def as_command(job: Stage, root: Path, cache: str) -> None:
    """Runs a stage's command line, with the folder `cache` as compilation cache ("" for none).

    Raises:
        RuntimeError: the command failed; the error has the end of its output.
    """
    command = [sys.executable, *shlex.split(job.command(root))[1:]]
    kept = {
        compilation_cache.VARIABLE: cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(compilation_cache.MIN_SECONDS),
    }
    ended = subprocess.run(command, env=os.environ | kept, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{job.name} failed:\n{ended.stderr[-3000:]}")


def work(name: str, root: Path, steps: int, suite: Suite) -> contest.Work:
    """Returns a contestant's turn: its next stage, to the end."""
    number = 1 if name in (COLD, WARM) else int(name)
    jobs = stages(name, number, steps, suite)
    run: Callable[[], Any]
    if name == WARM:
        gin_utils.log_progress()  # logs like a command line
        run = lambda: next(jobs).run(root)  # noqa: E731
    else:
        cache = str(root / "compiled") if name == COLD else ""
        run = lambda: as_command(next(jobs), root, cache)  # noqa: E731
    return contest.Work(run)


def measure(
    root: Path, sizes: Sequence[int], steps: int, turns: int, suite: str
) -> dict[str, dict[str, Any]]:
    """Measures the seconds of every contestant, and of its training steps."""
    names = [COLD, WARM, *(str(size) for size in sizes if size > 1)]
    given = ["benchmarks.fleet", "--root", str(root), "--steps", str(steps), "--suite", suite]
    found = contest.compare({name: [*given, "--serve", name] for name in names}, turns)
    for name, row in found.items():
        # The first single run compiled its step.
        folders = [
            root / f"{name}_{turn}" for turn in range(warm_ups(name), warm_ups(name) + turns)
        ]
        seconds = [results.training_seconds(folder) for folder in folders]
        row["steps_alone_seconds"] = statistics.median(seconds)
        del row["peak_mib"], row["before_mib"]  # memory of the process that starts the commands
    return found


def warm_ups(name: str) -> int:
    """Returns the unmeasured turns of a contestant. Single runs need one to compile the step."""
    return 1 if name in (COLD, WARM) else 0


def comparisons(found: dict[str, dict[str, Any]], sizes: Sequence[int]) -> list[dict[str, float]]:
    """Returns the seconds of each fleet and of as many single runs."""
    cold, warm = found[COLD], found[WARM]
    lines = []
    for size in sizes:
        fleet = cold if size == 1 else found[str(size)]
        line = {
            "runs": size,
            "fleet": fleet["median_seconds"],
            "cold": size * cold["median_seconds"],
            "warm": size * warm["median_seconds"],
            "fleet_steps_alone": fleet["steps_alone_seconds"],
            "warm_steps_alone": size * warm["steps_alone_seconds"],
        }
        line["fleet/cold"] = line["fleet"] / line["cold"]
        line["fleet/warm"] = line["fleet"] / line["warm"]
        lines.append(line)
    return lines


def main() -> None:
    """Prints a table, and writes the figures to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--suite", choices=SUITES, default="text", help="default: %(default)s")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.serve:
        suite = SUITES[args.suite]
        contest.serve(lambda: work(args.serve, args.root, args.steps, suite), warm_ups(args.serve))
        return
    with tempfile.TemporaryDirectory() as root:
        found = measure(Path(root), args.sizes, args.steps, args.turns, args.suite)
    lines = comparisons(found, args.sizes)
    print(figures.table(list(lines[0]), [list(line.values()) for line in lines]))
    record = {
        "steps": args.steps,
        "examples_of_a_run_in_a_step": SUITES[args.suite].rows,
        "turns": args.turns,
    }
    record |= {"machine": figures.machine(), "contestants": found, "comparisons": lines}
    figures.write(record, args.out)


if __name__ == "__main__":
    main()
