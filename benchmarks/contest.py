"""Benchmark contestants in separate processes that take turns.

Turns spread other load on the machine over all contestants, and separate processes share neither
memory nor threads. A contestant prepares, warms up, and then does its work once for every line on
standard input. Memory is the peak resident set of the process, or the contestant's own figure.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


def peak_mib() -> float:
    """Returns the peak resident set of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Work(NamedTuple):
    """Work of a contestant in a turn.

    Attributes:
        run: runs one turn; returns when everything is computed.
        peak_mib: returns the peak memory so far, in MiB.
    """

    run: Callable[[], Any]
    peak_mib: Callable[[], float] = peak_mib


def serve(prepare: Callable[[], Work], warm_ups: int = 1) -> None:
    """Runs a contestant: one turn for every line on standard input.

    Prints lines of JSON: the seconds of preparation and warm-up and the memory before, then the
    seconds and peak memory of each turn.

    Args:
        prepare: builds the model and the batches.
        warm_ups: turns before the first measured one; they compile.
    """
    before, start = peak_mib(), time.perf_counter()
    work = prepare()
    prepared = time.perf_counter()
    for _ in range(warm_ups):
        work.run()
    ready = {"prepare_seconds": prepared - start, "warm_up_seconds": time.perf_counter() - prepared}
    print(json.dumps({"before_mib": before, **ready}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        work.run()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_mib": work.peak_mib()}), flush=True)


def compare(
    commands: Mapping[str, Sequence[str]], turns: int, together: int | None = None
) -> dict[str, dict[str, Any]]:
    """Measures every contestant's seconds per turn and peak memory.

    Args:
        commands: name -> arguments of `python -m`; the command must call `serve`.
        turns: number of turns of each contestant.
        together: number of contestants in memory at once, which take turns with each other; None
            for all.

    Raises:
        RuntimeError: a contestant ended early.
    """
    names, found = list(commands), {}
    size = together or len(names)
    for first in range(0, len(names), size):
        heat = {name: commands[name] for name in names[first : first + size]}
        found |= _heat(heat, turns)
    return found


def _heat(commands: Mapping[str, Sequence[str]], turns: int) -> dict[str, dict[str, Any]]:
    workers: dict[str, subprocess.Popen] = {}
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    try:
        for name, command in commands.items():
            workers[name] = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            found[name] = _answer(workers[name])  # contestants prepare one after another
        for _ in range(turns):
            for name, worker in workers.items():
                worker.stdin.write("turn\n")  # type: ignore[union-attr]  # a pipe
                worker.stdin.flush()  # type: ignore[union-attr]
                answer = _answer(worker)
                seconds[name].append(answer["seconds"])
                found[name]["peak_mib"] = answer["peak_mib"]
    finally:
        for worker in workers.values():
            worker.communicate()  # closes standard input, which ends the worker
    return {
        name: {**found[name], **summary(seconds[name]), "all_seconds": seconds[name]}
        for name in commands
    }


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Returns the median, minimum and maximum of measurements."""
    return {
        "median_seconds": statistics.median(seconds),
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
    }


def _answer(worker: subprocess.Popen) -> dict[str, Any]:
    while line := worker.stdout.readline():  # type: ignore[union-attr]
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(
        f"{worker.args} ended without an answer (exit code {worker.wait()}). See its output above."
    )
