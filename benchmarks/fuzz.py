"""Mutated files of every format that MPT-JAX reads, each read in a process of limited memory.

    python -m benchmarks.fuzz [--inputs 2000 | --seconds 600] [--seed 0] [--processes 1]
    python -m benchmarks.fuzz --seed 0 --input 17        # one input again, with its traceback

A reader may load a mutated file, or raise ValueError or OSError. Any other error, a crash, and more
than 60 seconds or the limit of memory is a failure, and so are values that differ although a digest
of them was recorded. Failures are printed with the command that repeats them. Checkpoints of a run
and of Orbax take five to ten times as long as others, and are drawn half as often.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import queue
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import figures
from benchmarks.fuzz_mutations import mutate

MEMORY = 2 * 2**30  # bytes that reading may add to the memory of the process
SECONDS = 60  # for one input
BLOCK = 5000  # inputs of one process, whose imports and originals take some 15 seconds
REJECTED, EQUAL, DIFFERS, FAILED = "rejected", "equal", "differs", "failed"
ROOT = Path(__file__).resolve().parents[1]


class Outcome(NamedTuple):
    """Outcome of an input.

    Attributes:
        number: the number of the input.
        format: its format.
        outcome: `'rejected'` (ValueError or OSError), `'equal'` or `'differs'` (from the original),
            or `'failed'`.
        error: the error of a failure.
    """

    number: int
    format: str
    outcome: str
    error: str = ""


class Inputs:
    """The originals of all formats, and copies of them with one mutated file.

    Args:
        folder: an existing folder for the files.
        seed: the seed of the mutations.
        names: the formats; empty for all.
    """

    def __init__(self, folder: Path, seed: int, names: Sequence[str] = ()):
        from benchmarks.fuzz_formats import FORMATS  # imports JAX, which the parent does not need

        self._folder, self._seed = folder, seed
        self._formats = {name: FORMATS[name] for name in names or FORMATS}
        self._drawn = [name for name, kind in self._formats.items() for _ in range(kind.share)]
        self._originals: dict[str, str] = {}
        self._files: dict[str, list[Path]] = {}
        for name, kind in self._formats.items():
            (folder / name).mkdir()
            kind.write(folder / name)
            copy = self._copy(name)
            self._files[name] = sorted(path for path in copy.rglob("*") if path.is_file())
            self._originals[name] = kind.read(copy)
            self._copy(name)

    def _copy(self, name: str) -> Path:
        """Copies an original into the folder that is read."""
        target = self._folder / "read" / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self._folder / name, target)
        return target

    def outcome(self, number: int, trace: bool = False) -> Outcome:
        """Returns the outcome of an input; prints its mutation and traceback if `trace`."""
        rng = random.Random(f"{self._seed}/{number}")
        name = rng.choice(self._drawn)
        kind, file = self._formats[name], rng.choice(self._files[name])
        before = file.read_bytes()
        file.write_bytes(mutate(before, rng, file.name))
        if trace:
            print(f"{name}: {file.name}", file.read_bytes()[:2000])
        outcome = Outcome(number, name, *self._read(name, trace))
        if kind.changes_folder:
            self._copy(name)
        else:
            file.write_bytes(before)
        return outcome

    def _read(self, name: str, trace: bool) -> tuple[str, str]:
        """Reads a copy; returns the outcome and the error."""
        kind = self._formats[name]
        try:
            with limited(MEMORY):
                found = kind.read(self._folder / "read" / name)
        except (ValueError, OSError) as error:
            if trace:
                traceback.print_exc()
            return REJECTED, _shown(error)
        except BaseException as error:  # noqa: BLE001 - what the readers must not raise
            if trace:
                traceback.print_exc()
            if isinstance(error, KeyboardInterrupt):
                raise
            return FAILED, _shown(error)
        if found == self._originals[name]:
            return EQUAL, ""
        if kind.has_digest:
            return FAILED, "other values were read without an error"
        return DIFFERS, ""


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


@contextlib.contextmanager
def limited(added: int) -> Iterator[None]:
    """Limits the memory that the block may add to this process, in bytes; then a MemoryError is
    raised."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + added, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def outcomes(seed: int, numbers: Iterable[int], names: Sequence[str] = ()) -> Iterator[Outcome]:
    """Yields the outcomes of some inputs, in this process."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = Inputs(Path(folder), seed, names)
        for number in numbers:
            yield inputs.outcome(number)


# --- Processes -----------------------------------------------------------------------------------


def work(seed: int, first: int, names: Sequence[str]) -> None:
    """Writes the outcomes of a block of inputs to standard output, one line of JSON each."""
    for outcome in outcomes(seed, range(first, first + BLOCK), names):
        print(json.dumps([*outcome, _peak_kilobytes()]), flush=True)


def _peak_kilobytes() -> int:
    """Returns the peak of this process's memory. `ru_maxrss` would contain the memory that the
    parent had when it started this process."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Total:
    """The outcomes of all processes."""

    def __init__(self, seed: int, inputs: int, seconds: float):
        self.counts: collections.Counter[str] = collections.Counter()
        self.by_format: dict[str, collections.Counter[str]] = {}
        self.failures: list[Outcome] = []
        self.peak = 0  # bytes
        self.seed, self._next, self._inputs = seed, 0, inputs
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()

    def take_block(self) -> tuple[int, int] | None:
        """Returns the range of the next inputs; None if there are enough."""
        with self._lock:
            first, end = self._next, min(self._next + BLOCK, self._inputs)
            self._next = end
        return None if first >= end or self.is_over() else (first, end)

    def is_over(self) -> bool:
        """Whether the time has ended."""
        return time.monotonic() > self._end

    def add(self, outcome: Outcome, peak: int = 0) -> None:
        """Counts an outcome, and prints a failure with the command that repeats it."""
        with self._lock:
            self.counts[outcome.outcome] += 1
            counts = self.by_format.setdefault(outcome.format, collections.Counter())
            counts[outcome.outcome] += 1
            self.peak = max(self.peak, peak)
            if outcome.outcome == FAILED:
                self.failures.append(outcome)
                command = f"python -m benchmarks.fuzz --seed {self.seed} --input {outcome.number}"
                print(f"{outcome.format}: {outcome.error}\n    {command}", flush=True)


def _run_block(total: Total, first: int, end: int, names: Sequence[str]) -> int:
    """Runs inputs in one process until one of them ends it; returns the next input."""
    command = [sys.executable, "-m", "benchmarks.fuzz", "--seed", str(total.seed)]
    command += ["--work", str(first), *(f"--format={name}" for name in names)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment
    ) as process:
        lines: queue.Queue[bytes] = queue.Queue()
        assert process.stdout is not None
        reader = threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            for number in range(first, end):
                start = SECONDS + (240 if number == first else 0)  # imports and originals
                try:
                    line = lines.get(timeout=start)
                    *fields, peak = json.loads(line)
                    total.add(Outcome(*fields), 1024 * peak)
                except (queue.Empty, ValueError) as error:
                    ended = "more than 60 s" if isinstance(error, queue.Empty) else "a crash"
                    total.add(Outcome(number, "?", FAILED, ended))
                    return number + 1
                if total.is_over():
                    return end
        finally:
            process.kill()
    return end


def _forward(stream: Any, lines: queue.Queue[bytes]) -> None:
    for line in stream:
        if line.startswith(b"["):
            lines.put(line)
    lines.put(b"")  # the process has ended


def run(total: Total, processes: int, names: Sequence[str] = ()) -> dict[str, Any]:
    """Runs inputs in several processes. Returns the counts and the peak of memory."""

    def worker() -> None:
        while block := total.take_block():
            first, end = block
            while first < end and not total.is_over():
                first = _run_block(total, first, end, names)

    threads = [threading.Thread(target=worker) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "inputs": total.counts.total(),
        "seed": total.seed,
        "outcomes": dict(total.counts),
        "by_format": {name: dict(counts) for name, counts in sorted(total.by_format.items())},
        "peak_megabytes": round(total.peak / 1e6),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2**31, help="number of inputs")
    parser.add_argument("--seconds", type=float, default=600, help="time limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--format", action="append", default=[], help="only this format")
    parser.add_argument("--input", type=int, help="repeat one input")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.seed, arguments.work, arguments.format)
        os._exit(0)
    if arguments.input is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(
                Inputs(Path(folder), arguments.seed, arguments.format).outcome(
                    arguments.input, True
                )
            )
        return
    total = Total(arguments.seed, arguments.inputs, arguments.seconds)
    figures.report(run(total, arguments.processes, arguments.format), arguments.out)
    sys.exit(1 if total.failures else 0)


if __name__ == "__main__":
    main()
