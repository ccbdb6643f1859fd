"""Seconds and traced tf.data functions of a job of many small tasks, from files.

    python -m benchmarks.many_tasks [--tasks 10 40 200] [--rows 24] [--batch_size 4] [--out FILE]

Each job is `python -m t5x.train` with gin/mpt_target.gin and gin/tiny.gin: three steps and one
evaluation, in a separate process, with an empty compilation cache. A task has one file, which is
split into train, validation and test. Wall seconds are from the start of the process to its end;
the processor seconds of all its threads depend less on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import figures
from mpt_jax.runtime import compilation_cache

WORDS = {"good": "positive", "bad": "negative"}
MODULE = """
from pathlib import Path
from mpt_jax.tasks import files
for number in range({tasks}):
    files.register(
        f"mine_{{number}}",
        data=Path(__file__).with_name(f"data_{{number}}.jsonl"),
        inputs="sst2 : {{text}}",
        targets="{{label}}",
        labels={labels},
    )
"""


def write_tasks(folder: Path, tasks: int, rows: int) -> None:
    """Writes the module `many_tasks_module` and the files of its tasks."""
    for number in range(tasks):
        lines = [
            json.dumps({"text": f"the film {number} {i} was {word} .", "label": label})
            for i in range(rows)
            for word, label in [list(WORDS.items())[i % 2]]
        ]
        (folder / f"data_{number}.jsonl").write_text("\n".join(lines) + "\n")
    content = MODULE.format(tasks=tasks, labels=tuple(WORDS.values()))
    (folder / "many_tasks_module.py").write_text(content)


def measure(tasks: int, rows: int, batch_size: int, steps: int = 3) -> dict[str, float]:
    """Returns wall and processor seconds of a job, and the tf.data functions that it traced.

    Raises:
        CalledProcessError: the job failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(folder, tasks, rows)
        names = [f"mine_{number}" for number in range(tasks)]
        environment = os.environ | {
            "MPT_JAX_ROOT": str(folder / "root"),
            compilation_cache.VARIABLE: "",
            "PYTHONPATH": os.pathsep.join([scratch, os.getcwd()]),
        }
        command = [
            *(sys.executable, "-m", "benchmarks.many_tasks", "--child"),
            *("--gin_file=gin/mpt_target.gin", "--gin_file=gin/tiny.gin"),
            *(f"--gin.TARGET_TASKS={names}", "--gin.TASK_MODULES=['many_tasks_module']"),
            *(f"--gin.TRAIN_STEPS={steps}", f"--gin.BATCH_SIZE={batch_size}"),
            "--gin.ON_OVERLONG='truncate'",
        ]
        before = time.monotonic()
        child = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        wall = time.monotonic() - before
        found = json.loads(child.stdout.splitlines()[-1])
        return {"tasks": tasks, "wall_seconds": round(wall, 1), **found}


def run_child(arguments: list[str]) -> None:
    """Trains in this process, and prints its processor seconds and traced functions."""
    from tensorflow.python.data.ops import structured_function

    traced = 0
    trace = structured_function.StructuredFunctionWrapper.__init__

    def counting(*args, **kwargs) -> None:
        nonlocal traced
        traced += 1
        trace(*args, **kwargs)

    structured_function.StructuredFunctionWrapper.__init__ = counting
    sys.argv = ["train", *arguments]
    try:
        runpy.run_module("t5x.train", run_name="__main__", alter_sys=True)
    finally:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        seconds = round(usage.ru_utime + usage.ru_stime, 1)
        print(json.dumps({"processor_seconds": seconds, "traced_functions": traced}), flush=True)


def main() -> None:
    """Prints the figures, and writes them to --out if given."""
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 40, 200])
    parser.add_argument("--rows", type=int, default=24, help="rows of each task")
    # A step has this many rows of each task; with 48, 200 tasks need 20 GB and minutes a step.
    parser.add_argument("--batch_size", type=int, default=4, help="examples of each task per step")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows, batch_size = arguments.rows, arguments.batch_size
    found = [measure(number, rows, batch_size) for number in arguments.tasks]
    settings = {"rows": rows, "batch_size": batch_size}
    figures.report({"jobs": found, **settings, **figures.machine()}, arguments.out)


if __name__ == "__main__":
    main()
