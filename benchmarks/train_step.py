"""One MPT training step against PEFT's: seconds and peak memory, side by side in one run.

    python -m benchmarks.train_step [--repeats 7] [--out docs/benchmarks/train_step.json]

T5-small shape, random weights, float32, CPU; B = 16, 100 prompt and 128 text positions, targets of
8, six tasks in every batch. Each contestant lives in a process of its own with all cores; they take
turns, one step at a time, so that whatever else the machine does hits all of them. PEFT needs the
`parity` extra. Figures are medians; memory is the peak resident set of the whole process after the
last step, and of the same process before its model was built. Our trainer tells malloc to keep
freed memory (mpt_jax/runtime/malloc.py); PEFT runs as it comes, and once more with the same help.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import numpy as np

from benchmarks import contest, figures
from benchmarks.contestants import Ours, Peft, t5
from mpt_jax.batching import collate
from mpt_jax.runtime import malloc

B, P, TEXT, L, K = 16, 100, 128, 8, 6
CONTESTANTS = ("peft", "peft_keeping_memory", "mpt_jax", "mpt_jax_distilled")


def batch() -> collate.Batch:
    """The same texts [B, TEXT] and targets [B, L] for everyone, no padding."""
    rng = np.random.default_rng(0)
    text, targets = rng.integers(3, 32000, (B, TEXT)), rng.integers(3, 32000, (B, L))
    rows = [collate.Example(text[i].tolist(), targets[i].tolist(), i % K) for i in range(B)]
    return collate.unpacked(rows, P, TEXT, L)


def work(name: str) -> contest.Work:
    """A contestant's turn: one step."""
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
    """Every contestant's median step and peak memory, steps taken in turns."""
    command = ["benchmarks.train_step", "--serve"]
    found = contest.compare({name: [*command, name] for name in CONTESTANTS}, repeats)
    kept = ("before_mib", "peak_mib", "median_seconds", "min_seconds", "max_seconds")
    return {name: {field: row[field] for field in kept} for name, row in found.items()}


def main() -> None:
    """Prints a table, and writes the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        # Two steps to compile, and for whatever else happens only once.
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
    machine = {"cores": os.cpu_count(), "machine": platform.processor() or platform.machine()}
    record = {"repeats": args.repeats, **machine, "contestants": found, "ratios": ratios}
    figures.report(record, args.out)


if __name__ == "__main__":
    main()
