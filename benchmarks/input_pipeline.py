"""Throughput and start-up time of the input pipeline, and the size of its saved position.

    python -m benchmarks.input_pipeline [--batches 300] [--out docs/benchmarks/input_pipeline.json]

The six toy source tasks under stochastic task sampling, 20 prompt and 48 text positions: batches of
48 rows on one host, and then of 128 rows for each of 1 to 64 hosts, of which the last one is
simulated, in turns. Seconds are CPU seconds of the whole process, so other load on the machine
matters little, if they are not called wall seconds.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import figures
from mpt_jax.core.runs import Runs
from mpt_jax.data import datasets, sampling
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.iterators import TrainIterator

LENGTHS = {"inputs": 48, "targets": 12}
HOSTS, ROWS = (1, 4, 16, 64), 128
KINDS: dict[str, dict[str, Any]] = {
    "unpacked": {"length_buckets": {}},
    "by length": {"length_buckets": {"inputs": [16, 32], "targets": [4]}, "by_length": True},
    "packed": {"pack": True},
}


def iterator(batch_size: int, kind: str = "unpacked", hosts: int = 1) -> TrainIterator:
    """Returns the last host's iterator over batches of `batch_size` rows of all hosts."""
    from mpt_jax.tasks import toy

    names = [task.name for task in toy.SOURCE_TASKS]
    converter = functools.partial(PromptFeatureConverter, prompt_length=20, runs=Runs(names))
    mixture = sampling.task_mixture(names, sampling.StochasticTasks(batch_size, seed=0))
    cfg = datasets.DatasetConfig(
        mixture, LENGTHS, "train", batch_size, shuffle=True, seed=0, **KINDS[kind]
    )
    return datasets.train_iterator(cfg, converter, num_hosts=hosts, host_index=hosts - 1)


def of_one_host(batches: int, batch_size: int = 48) -> dict[str, float]:
    """Measures seconds, rates and bytes of one pipeline, by name."""
    found = {}
    for attempt in ("first", "again"):  # tasks are already read in the second
        before, cpu = time.monotonic(), time.process_time()
        made = iterator(batch_size)
        next(made)
        found[f"{attempt}_start_wall_seconds"] = time.monotonic() - before
        found[f"{attempt}_start_seconds"] = time.process_time() - cpu
    cpu = time.process_time()
    for _ in range(batches):
        next(made)
    found["rows_per_second"] = batches * batch_size / (time.process_time() - cpu)
    packed = iterator(batch_size, "packed")
    next(packed)
    cpu, examples = time.process_time(), 0
    for _ in range(batches):
        examples += int(next(packed)["encoder_segment_ids"].max(axis=1).sum())
    found["packed_examples_per_second"] = examples / (time.process_time() - cpu)
    before = time.monotonic()
    state = made.state()
    found["position_wall_seconds"] = time.monotonic() - before
    found["position_bytes"] = len(state)
    before = time.monotonic()
    made.restore(state)
    next(made)
    found["restore_wall_seconds"] = time.monotonic() - before
    return {name: round(value, 4) for name, value in found.items()}


def of_many_hosts(repeats: int, batches: int = 32) -> dict[str, dict[str, float]]:
    """Measures CPU milliseconds of a batch on one of several hosts: the median of `repeats`."""
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        made = {hosts: iterator(ROWS * hosts, kind, hosts) for hosts in HOSTS}
        times: dict[int, list[float]] = {hosts: [] for hosts in HOSTS}
        for _ in range(repeats):
            for hosts, each in made.items():
                cpu = time.process_time()
                for _ in range(batches):
                    next(each)
                times[hosts].append((time.process_time() - cpu) / batches * 1000)
        found[kind] = {
            f"{hosts} hosts": round(statistics.median(each), 3) for hosts, each in times.items()
        }
    return found


def main() -> None:
    """Prints the figures, and writes them to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {
        "one host": of_one_host(arguments.batches),
        f"milliseconds of {ROWS} rows on the last host": of_many_hosts(arguments.repeats),
    }
    figures.report(found, arguments.out)


if __name__ == "__main__":
    main()
