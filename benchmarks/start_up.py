"""Start-up time of commands, from the start of the process to the first result.

    python -m benchmarks.start_up [--repeats 5] [--out docs/benchmarks/start_up.json]

    help       `mpt-jax --help`, until it ends
    predict    one request to the shipped tiny T5 and its prompts, until the answer
    train      the MPT source stage on the toy suite with the tiny T5 and distillation, until the
               end of the first step

predict and train run with empty caches of compiled functions and of tokens (cold), and with caches
that an earlier process filled (warm). Laps of train are the seconds between lines of its log: until
the gin files are parsed and the training batches are ready (mostly imports), until the state is
initialized, until the evaluators are ready, and until the end of the first step. Commands run one
at a time, in turns. Figures are median wall seconds. Python's byte code and the file system cache
are as on a machine that has run the command before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures
from mpt_jax.data import token_cache
from mpt_jax.runtime import compilation_cache, paths

STAGE = ("--gin_file=gin/mpt_source.gin", "--gin_file=gin/tiny.gin", "--gin.TRAIN_STEPS=1")
# Parts of log lines -> the lap that they end.
LAPS = {
    "Expected share of each task": "imports_and_training_data",
    "Training 6 run": "initial_state",
    "Passes over each task": "evaluators",
    "First step after": "first_step",
}
REQUEST = b'{"task": "toy_sst2", "inputs": "sst2 : a fine film"}\n'


def seconds_of_help() -> float:
    """Returns the wall seconds of `mpt-jax --help`."""
    before = time.monotonic()
    call = "from mpt_jax.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", call, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - before


def seconds_to_first_answer(cache: str) -> float:
    """Returns the wall seconds of `mpt-jax predict` to its first answer, with this cache folder.

    Raises:
        RuntimeError: the command ended without an answer.
    """
    prompts = paths.shipped(name="tiny_t5/mpt_source")
    command = [sys.executable, "-m", "mpt_jax.serving.predict", "--prompts", prompts]
    before = time.monotonic()
    with subprocess.Popen(
        command,
        env=_environment(cache),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(REQUEST)
        child.stdin.flush()
        answer = child.stdout.readline()
        found = time.monotonic() - before
        child.stdin.close()
    if b"prediction" not in answer:
        raise RuntimeError(f"`mpt-jax predict` answered {answer!r} instead of a prediction.")
    return found


def seconds_to_first_step(cache: str) -> float:
    """Returns the wall seconds of training to its first step, with this cache folder."""
    return sum(laps_to_first_step(cache).values())


def laps_to_first_step(cache: str) -> dict[str, float]:
    """Returns the wall seconds of each of `LAPS`, with this cache folder.

    Raises:
        RuntimeError: training ended before its first step.
    """
    with tempfile.TemporaryDirectory() as root:
        environment = _environment(cache) | {"MPT_JAX_ROOT": root}
        before, log, laps = time.monotonic(), [], {}
        command = [sys.executable, "-m", "mpt_jax.train", *STAGE]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
            assert child.stderr is not None
            for line in child.stderr:
                log.append(line)
                for part, name in LAPS.items():
                    if part in line:
                        laps[name] = time.monotonic() - before
                        before += laps[name]
                if len(laps) == len(LAPS):
                    child.kill()
                    return laps
        raise RuntimeError("Training ended before its first step:\n" + "".join(log[-20:]))


MEASURES = {"predict": seconds_to_first_answer, "train": seconds_to_first_step}


def _environment(cache: str) -> dict[str, str]:
    return os.environ | {
        compilation_cache.VARIABLE: f"{cache}/compiled",
        token_cache.VARIABLE: f"{cache}/tokens",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(compilation_cache.MIN_SECONDS),
    }


def median_laps(repeats: int) -> dict[str, float]:
    """Returns the median seconds of each lap of training with filled caches."""
    with tempfile.TemporaryDirectory() as filled:
        laps = [laps_to_first_step(filled) for _ in range(repeats + 1)][1:]
    return {name: round(statistics.median(each[name] for each in laps), 2) for name in laps[0]}


def measure(commands: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Returns all seconds of every command, by name and state of the cache."""
    found: dict[str, list[float]] = {"help": []}
    with tempfile.TemporaryDirectory() as filled:
        for name in commands:
            MEASURES[name](filled)
        for _ in range(repeats):
            found["help"].append(seconds_of_help())
            for name in commands:
                with tempfile.TemporaryDirectory() as empty:
                    found.setdefault(f"{name}_cold", []).append(MEASURES[name](empty))
                found.setdefault(f"{name}_warm", []).append(MEASURES[name](filled))
    return found


def main() -> None:
    """Prints the figures, and writes them to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--commands", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.commands, arguments.repeats)
    medians = {f"{name}_seconds": round(statistics.median(x), 2) for name, x in found.items()}
    every = {name: [round(second, 2) for second in x] for name, x in found.items()}
    laps = {"train_warm_laps": median_laps(arguments.repeats)}
    figures.report({**medians, **laps, "all": every, **figures.machine()}, arguments.out)


if __name__ == "__main__":
    main()
