"""Seconds and peak memory of an MPT training step, compared with PEFT's.

    python -m benchmarks.train_step [--repeats 7] [--out docs/benchmarks/train_step.json]

T5-small shape, random weights, float32, CPU; B = 16, 100 prompt and 128 text positions, targets of
8 tokens, six tasks in every batch. Each contestant has a separate process with all cores. They take
turns, one step at a time, so that other load on the machine affects all of them. PEFT needs the
`parity` extra. Figures are medians. Memory is the peak resident set of the process after the last
step, and before its model was built. Our trainer makes malloc keep freed memory
(mpt_jax/runtime/malloc.py); PEFT runs with default settings, and once more with this setting.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks import contest, figures
from benchmarks.contestants import Ours, Peft, t5
from mpt_jax.batching import collate
from mpt_jax.runtime import malloc

B, P, TEXT, L, K = 16, 100, 128, 8, 6
CONTESTANTS = ("peft", "peft_keeping_memory", "mpt_jax", "mpt_jax_distilled")


def batch() -> collate.Batch:
    """Returns the texts [B, TEXT] and targets [B, L] for all contestants, without padding."""
    rng = np.random.default_rng(0)
    text, targets = rng.integers(3, 32000, (B, TEXT)), rng.integers(3, 32000, (B, L))
    rows = [collate.Example(text[i].tolist(), targets[i].tolist(), i % K) for i in range(B)]
    return collate.unpacked(rows, P, TEXT, L)


def work(name: str) -> contest.Work:
    """Returns a contestant's turn: one step."""
    config = t5("small")
    if name == "peft_keeping_memory":
        malloc.keep_freed_memory()
    side = Peft(config, P, K) if "peft" in name else Ours(config, P, K, "distilled" in name)
    made = batch()

    def run() -> None:
        side.step(made)
        side.wait()

    return contest.Work(run)


def compare(repeats: int) -> dict[str, dict[str, float]]:
    """Measures every contestant's median step time and peak memory, in turns."""
    command = ["benchmarks.train_step", "--serve"]
    found = contest.compare({name: [*command, name] for name in CONTESTANTS}, repeats)
    kept = ("before_mib", "peak_mib", "median_seconds", "min_seconds", "max_seconds")
    return {name: {field: row[field] for field in kept} for name, row in found.items()}


def main() -> None:
    """Prints a table, and writes the figures to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        # Two steps for compilation and other one-time work.
        contest.serve(lambda: work(args.serve), warm_ups=2)
        return
    found = compare(args.repeats)
    ratios = {
        "time, ours / PEFT": found["mpt_jax"]["median_seconds"] / found["peft"]["median_seconds"],
        "time, ours / PEFT with kept memory": found["mpt_jax"]["median_seconds"]
        / found["peft_keeping_memory"]["median_seconds"],
        "peak memory, ours / PEFT": found["mpt_jax"]["peak_mib"] / found["peft"]["peak_mib"],
        "time, distilled / not": found["mpt_jax_distilled"]["median_seconds"]
        / found["mpt_jax"]["median_seconds"],
    }
    for name, row in found.items():
        print(
            f"{name:20} {row['median_seconds']:.2f} s (min {row['min_seconds']:.2f}, max "
            f"{row['max_seconds']:.2f})  peak {row['peak_mib']:.0f} MiB, "
            f"{row['before_mib']:.0f} before the model"
        )
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x")
    record = {"repeats": args.repeats, "versions": figures.versions(), **figures.machine()}
    record |= {"contestants": found, "ratios": ratios}
    figures.report(record, args.out)


if __name__ == "__main__":
    main()
