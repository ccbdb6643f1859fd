"""Prediction time by the number of tasks in the prompt bank, measured in one process.

    python -m benchmarks.bank [--repeats 7] [--out docs/benchmarks/bank.json]

T5-small shape, random weights, float32; B = 16, 100 prompt and 64 text positions, 16 decoded
tokens without an end of sequence. The tasks of every batch are drawn anew from the whole bank.
Banks take turns, one batch at a time, so that other load on the machine affects all of them.
Memory is the size of the bank's arrays, next to the value by the formula of docs/serving.md. The
goal is at most 1.05 times the time of one task.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import contest, figures
from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.backbones.t5 import T5Config, Transformer, t5_config
from mpt_jax.core.runs import Runs
from mpt_jax.prompts.mpt import MPT
from mpt_jax.runtime import malloc
from mpt_jax.serving.predict.compiled import Functions
from mpt_jax.serving.prompt_bank import Bank

B, P, TEXT, L = 16, 100, 64, 16
SIZES = (1, 10, 100, 1_000, 10_000)


class NoEnd:
    """A vocabulary without end of sequence, so that every batch decodes the same length."""

    eos_id = -1


def artifact(config: T5Config, tasks: int) -> Artifact:
    """Returns an in-memory artifact with random factors of many tasks on one shared prompt."""
    rng = np.random.default_rng(0)
    width = config.emb_dim
    params = {
        "shared": rng.normal(size=(1, P, width)).astype(np.float32),
        "task_left": rng.normal(size=(tasks, P, 1)).astype(np.float32),
        "task_right": rng.normal(size=(tasks, 1, width)).astype(np.float32),
    }
    said = {"embedding_sha256": "random", "vocabulary_sha256": None}
    runs = Runs([f"task_{number}" for number in range(tasks)])
    return Artifact("memory", MPT(P), runs, params, said)


def weights(config: T5Config) -> Any:
    """Returns a random backbone."""
    tokens = np.ones((1, 2), np.int32)
    made = jax.jit(Transformer(config).init)(jax.random.PRNGKey(0), tokens, tokens > 0, tokens)
    return made["params"]


def batches(config: T5Config, backbone: Any, tasks: int) -> tuple[Bank, Callable[[], None]]:
    """Returns a bank, and a function that decodes one batch of its tasks."""
    bank = Bank([artifact(config, tasks)])
    predict = jax.jit(Functions(config, bank.method, L, NoEnd()).predict)
    rng = np.random.default_rng(tasks)

    def run() -> None:
        tokens = rng.integers(3, config.vocab_size, (B, TEXT)).astype(np.int32)
        rows = rng.integers(0, tasks, B).astype(np.int32)
        jax.block_until_ready(predict(backbone, bank.arrays, tokens, rows))

    return bank, run


def measure(config: T5Config, sizes: Sequence[int], repeats: int) -> dict[str, dict[str, Any]]:
    """Measures seconds per batch and bytes for every size of bank."""
    backbone = weights(config)
    made = {tasks: batches(config, backbone, tasks) for tasks in sizes}
    for _, run in made.values():
        for _ in range(2):  # compilation and other one-time work
            run()
    seconds: dict[int, list[float]] = {tasks: [] for tasks in sizes}
    for _ in range(repeats):
        for tasks, (_, run) in made.items():
            start = time.perf_counter()
            run()
            seconds[tasks].append(time.perf_counter() - start)
    found = {}
    for tasks, (bank, _) in made.items():
        rows = 1 << (tasks - 1).bit_length()
        found[str(tasks)] = {
            **contest.summary(seconds[tasks]),
            "all_seconds": seconds[tasks],
            "bytes": bank.nbytes,
            "bytes_by_the_formula": 4 * (rows * (P + config.emb_dim + 1) + P * config.emb_dim),
        }
    first = found[str(sizes[0])]["median_seconds"]
    for row in found.values():
        row["ratio_to_the_first"] = row["median_seconds"] / first
    return found


def main() -> None:
    """Prints a table, and writes the figures to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", default="t5_1_0_small", help="default: %(default)s")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    malloc.keep_freed_memory()
    found = measure(t5_config(args.model), args.sizes, args.repeats)
    rows = [
        (tasks, row["median_seconds"], row["ratio_to_the_first"], row["bytes"] / 2**20)
        for tasks, row in found.items()
    ]
    print(figures.table(("tasks", "seconds a batch", "of the first", "MiB"), rows))
    record = {"repeats": args.repeats, "model": args.model, **figures.machine(), "banks": found}
    figures.write(record, args.out)


if __name__ == "__main__":
    main()
