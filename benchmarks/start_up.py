"""How long a training run takes from the start of its process to the end of its first step.

    python -m benchmarks.start_up [--repeats 5] [--out docs/benchmarks/start_up.json]

The MPT source stage on the toy suite with the tiny T5 and distillation, one command line a time,
in turns: with an empty compilation cache (cold) and with one that an earlier process filled
(warm). Figures are wall seconds, medians; Python's own byte code and the file system's cache are
as they are on a machine that has run the command before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import figures
from mpt_jax import compilation_cache

STAGE = ("--gin_file=gin/mpt_source.gin", "--gin_file=gin/tiny.gin", "--gin.TRAIN_STEPS=1")
FIRST_STEP = "First step after"


def seconds_to_first_step(cache: str) -> float:
    """Wall seconds of one start with the compilation cache in a folder.

    Raises:
        RuntimeError: the run ended before its first step.
    """
    with tempfile.TemporaryDirectory() as root:
        environment = os.environ | {
            "MPT_JAX_ROOT": root,
            compilation_cache.VARIABLE: cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(compilation_cache.MIN_SECONDS),
        }
        before, log = time.monotonic(), []
        command = [sys.executable, "-m", "mpt_jax.train", *STAGE]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
            assert child.stderr is not None
            for line in child.stderr:
                log.append(line)
                if FIRST_STEP in line:
                    found = time.monotonic() - before
                    child.kill()
                    return found
        raise RuntimeError("The run ended before its first step:\n" + "".join(log[-20:]))


def main() -> None:
    """Prints the figures and, on request, writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as filled:
        seconds_to_first_step(filled)
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as empty:
                cold.append(round(seconds_to_first_step(empty), 2))
            warm.append(round(seconds_to_first_step(filled), 2))
    found = {
        "cold_seconds": statistics.median(cold),
        "warm_seconds": statistics.median(warm),
        "all": {"cold": cold, "warm": warm},
        "cores": os.cpu_count(),
    }
    figures.report(found, arguments.out)


if __name__ == "__main__":
    main()
