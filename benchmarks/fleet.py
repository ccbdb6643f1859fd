"""Run time of a fleet of few-shot adaptations, compared with as many single-run jobs.

    python -m benchmarks.fleet --out docs/benchmarks/fleet.json

MPT's target stage on the toy suite as in the demo (gin/runs/demo.gin): every run trains on 32
examples for 200 steps of 4 examples, and is not evaluated. A fleet is one such command with n runs
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
from typing import Any

from benchmarks import contest, figures
from mpt_jax.config import gin_utils
from mpt_jax.experiments import demo, results
from mpt_jax.experiments.stages import Run, Stage, quoted, target_bindings, target_runs
from mpt_jax.runtime import compilation_cache

SHOTS = 32
STEPS, ROWS = demo.FEW
FILES = ("gin/mpt_target.gin", "gin/tiny.gin", "gin/runs/demo.gin")
COLD, WARM = "cold", "warm"


def fleet_runs(number: int) -> tuple[Run, ...]:
    """Returns the runs of a fleet: the demo's four target tasks, each with as many draws as needed.
    A fleet of fewer than four runs has one run for each of the first tasks.

    Raises:
        ValueError: `number` is greater than four and not a multiple of four.
    """
    tasks = demo.TARGETS[:number]
    if number % len(tasks):
        raise ValueError(
            f"A fleet of {number} runs cannot have equally many draws of {len(tasks)} tasks. "
            f"Set --sizes to multiples of {len(demo.TARGETS)}, or to fewer than "
            f"{len(demo.TARGETS)} runs."
        )
    return target_runs(tasks, range(number // len(tasks)), SHOTS)


def stage(root: Path, name: str, runs: Sequence[Run], steps: int) -> Stage:
    """Returns a stage that only trains these runs."""
    bindings = (
        f"ROOT = {quoted(str(root))}",  # has no source stage, so runs start from the shipped one
        *target_bindings(runs, ROWS),
        "train_script.train.infer_eval_dataset_cfg = None",
    )
    return Stage(name, FILES, bindings, tuple(runs), steps)


def stages(root: Path, name: str, number: int, steps: int) -> Iterator[Stage]:
    """Yields stages with new names and `number` runs each. Single runs cycle through the
    targets."""
    singles = itertools.cycle(fleet_runs(len(demo.TARGETS)))
    for turn in itertools.count():
        runs = [next(singles)] if number == 1 else fleet_runs(number)
        yield stage(root, f"{name}_{turn}", runs, steps)


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


def work(name: str, root: Path, steps: int) -> contest.Work:
    """Returns a contestant's turn: its next stage, to the end."""
    number = 1 if name in (COLD, WARM) else int(name)
    jobs = stages(root, name, number, steps)
    run: Callable[[], Any]
    if name == WARM:
        gin_utils.log_progress()  # logs like a command line
        run = lambda: next(jobs).run(root)  # noqa: E731
    else:
        cache = str(root / "compiled") if name == COLD else ""
        run = lambda: as_command(next(jobs), root, cache)  # noqa: E731
    return contest.Work(run)


def measure(root: Path, sizes: Sequence[int], steps: int, turns: int) -> dict[str, dict[str, Any]]:
    """Measures the seconds of every contestant, and of its training steps."""
    names = [COLD, WARM, *(str(size) for size in sizes if size > 1)]
    given = ["benchmarks.fleet", "--root", str(root), "--steps", str(steps)]
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
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.serve:
        contest.serve(lambda: work(args.serve, args.root, args.steps), warm_ups(args.serve))
        return
    with tempfile.TemporaryDirectory() as root:
        found = measure(Path(root), args.sizes, args.steps, args.turns)
    lines = comparisons(found, args.sizes)
    print(figures.table(list(lines[0]), [list(line.values()) for line in lines]))
    record = {"steps": args.steps, "examples_of_a_run_in_a_step": ROWS, "turns": args.turns}
    record |= {"machine": figures.machine(), "contestants": found, "comparisons": lines}
    figures.write(record, args.out)


if __name__ == "__main__":
    main()
