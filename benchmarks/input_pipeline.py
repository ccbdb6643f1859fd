"""Throughput and start-up time of the input pipeline, and the size of its saved position.

    python -m benchmarks.input_pipeline [--batches 300] [--out docs/benchmarks/input_pipeline.json]

The six toy source tasks under stochastic task sampling, B = 48, 20 prompt and 48 text positions.
CPU seconds are those of the whole process, so other load on the machine does not matter.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

from benchmarks import figures
from mpt_jax.core.runs import Runs
from mpt_jax.data import datasets, sampling
from mpt_jax.data.feature_converter import PromptFeatureConverter

LENGTHS = {"inputs": 48, "targets": 12}


def measure(batches: int, batch_size: int = 48) -> dict[str, float]:
    """Measures seconds, rates and bytes of one pipeline, by name."""
    from mpt_jax.tasks import toy

    names = [task.name for task in toy.SOURCE_TASKS]
    converter = functools.partial(PromptFeatureConverter, prompt_length=20, runs=Runs(names))
    mixture = sampling.task_mixture(names, sampling.StochasticTasks(batch_size, seed=0))
    cfg = datasets.DatasetConfig(mixture, LENGTHS, "train", batch_size, shuffle=True, seed=0)
    found = {}
    for attempt in ("first", "again"):  # tasks are already tokenized in the second
        before, cpu = time.monotonic(), time.process_time()
        iterator = datasets.train_iterator(cfg, converter)
        next(iterator)
        found[f"{attempt}_start_seconds"] = time.monotonic() - before
        found[f"{attempt}_start_cpu_seconds"] = time.process_time() - cpu
    before, cpu = time.monotonic(), time.process_time()
    for _ in range(batches):
        next(iterator)
    found["examples_per_second"] = batches * batch_size / (time.monotonic() - before)
    found["examples_per_cpu_second"] = batches * batch_size / (time.process_time() - cpu)
    before = time.monotonic()
    state = iterator.state()
    found["position_seconds"], found["position_bytes"] = time.monotonic() - before, len(state)
    before = time.monotonic()
    iterator.restore(state)
    next(iterator)
    found["restore_seconds"] = time.monotonic() - before
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Prints the figures, and writes them to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures.report(measure(arguments.batches), arguments.out)


if __name__ == "__main__":
    main()
