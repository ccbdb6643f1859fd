"""Start of a run on a mixture of 1,151,093 examples whose tokens are cached, and its memory.

    python -m benchmarks.large_mixture [--repeats 5] [--out docs/benchmarks/large_mixture.json]

The sizes and text lengths are those of the six source tasks (benchmarks/ragged_mix.py, where
lengths are assumed), with words of the toy vocabulary. A process without a cache writes it, in a
temporary folder. Others then start from it, one at a time. Each draws a batch of 128 rows, which is
the start, and 200 more. The file system cache is warm. Seconds are wall seconds, those of imports
apart. Memory is the resident set, which counts touched pages of mapped files.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figures, ragged_mix
from mpt_jax.data import token_cache

LENGTHS = {"inputs": ragged_mix.TEXT_LIMIT, "targets": ragged_mix.TARGET_LIMIT}
BATCH, BATCHES, PART = 128, 200, 4096


def texts(task: ragged_mix.SourceTask, examples: int) -> Iterator[dict[str, list[str]]]:
    """Yields the inputs and targets of a task, in parts."""
    from mpt_jax.tasks.toy_vocabulary import word_ids

    words = np.array([word for word in word_ids() if word.isalpha()])
    rng = np.random.default_rng(len(task.name))
    center = np.log(task.mean) - task.spread**2 / 2
    for first in range(0, examples, PART):
        count = min(PART, examples - first)
        drawn = rng.lognormal(center, task.spread, count).astype(int)
        inputs = np.clip(drawn, 4, ragged_mix.TEXT_LIMIT - 1)
        targets = rng.choice(task.targets, count)
        yield {
            name: [" ".join(rng.choice(words, n)) for n in lengths]
            for name, lengths in (("inputs", inputs), ("targets", targets - 1))
        }


def register(scale: float) -> list[str]:
    """Registers the tasks, with `scale` times their examples. Returns their names."""
    import seqio
    import tensorflow as tf

    from mpt_jax.data import in_memory, preprocessors
    from mpt_jax.tasks import toy

    names = []
    for task in ragged_mix.TASKS:
        name, examples = f"large_{task.name}", int(task.examples * scale)

        def dataset(split, shuffle_files, seed=None, task=task, examples=examples):
            del split, shuffle_files, seed
            spec = {side: tf.TensorSpec([None], tf.string) for side in LENGTHS}
            parts = functools.partial(texts, task, examples)
            return tf.data.Dataset.from_generator(parts, output_signature=spec).unbatch()

        source: Any = seqio.FunctionDataSource(dataset, splits=("train",))
        source.fingerprint = lambda split, name=name, examples=examples: [split, name, examples]
        provider = in_memory.TextTask(
            name,
            source=source,
            preprocessors=preprocessors.finish(name),
            output_features=preprocessors.output_features(toy.vocabulary()),
        )
        seqio.TaskRegistry.add_provider(name, provider)
        names.append(name)
    return names


def start(scale: float) -> dict[str, float]:
    """Starts a run in this process. Returns its figures by name."""
    began = time.monotonic()
    from mpt_jax.core.runs import Runs
    from mpt_jax.data import datasets, sampling
    from mpt_jax.data.feature_converter import PromptFeatureConverter

    names = register(scale)
    found = {"import_seconds": time.monotonic() - began, "imported_megabytes": _megabytes()}
    began = time.monotonic()
    mixture = sampling.task_mixture(names, sampling.StochasticTasks(BATCH, seed=0))
    converter = functools.partial(PromptFeatureConverter, prompt_length=100, runs=Runs(names))
    cfg = datasets.DatasetConfig(mixture, LENGTHS, "train", BATCH, shuffle=True, seed=0)
    batches = datasets.train_iterator(cfg, converter)
    next(batches)
    found |= {"start_seconds": time.monotonic() - began, "started_megabytes": _megabytes()}
    began = time.monotonic()
    for _ in range(BATCHES):
        next(batches)
    found["seconds_of_a_batch"] = (time.monotonic() - began) / BATCHES
    return found | {"megabytes": _megabytes()}


def _megabytes() -> float:
    """Returns the resident set of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def in_a_process(cache: Path, scale: float) -> dict[str, float]:
    """Returns what `start` returns in a separate process, with the token cache in a folder.

    Raises:
        CalledProcessError: the process failed.
    """
    command = [sys.executable, "-m", "benchmarks.large_mixture", "--scale", str(scale), "--start"]
    environment = os.environ | {token_cache.VARIABLE: str(cache)}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def measure(scale: float, repeats: int) -> dict[str, Any]:
    """Returns the figures of a start without a cache and of `repeats` starts with one."""
    with tempfile.TemporaryDirectory() as folder:
        cold = in_a_process(Path(folder), scale)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        warm = [in_a_process(Path(folder), scale) for _ in range(repeats)]
    return {
        "examples": sum(int(task.examples * scale) for task in ragged_mix.TASKS),
        "cache_megabytes": size / 1e6,
        "without_cache": cold,
        "with_cache": {name: statistics.median(each[name] for each in warm) for name in cold},
    }


def main() -> None:
    """Prints the figures, and writes them to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the examples")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.scale)))
        return
    figures.report(measure(arguments.scale, arguments.repeats), arguments.out)


if __name__ == "__main__":
    main()
