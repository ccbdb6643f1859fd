"""Cost of MPT's step by number of tasks, prompt length, packing and distillation.

    python -m benchmarks.scaling --out docs/benchmarks/scaling.json

T5-small shape, random weights, float32. Every step has the same 8 ragged texts
(benchmarks/ragged_mix.py, with assumed lengths), with tasks drawn from all K. Unpacked rows are as
long as the limits, 256 + P. Packed rows are twice as long, and as few as can hold all texts. The
steps of one curve take turns. With P = 0 nothing is trainable, so the compiler drops the backward
pass and only the frozen model's forward pass remains. By default (PromptOptimizer.absent_tasks =
'dense') every step updates the moments of all bank rows, so its cost grows with K. With 'hold' the
moments of absent tasks stay unchanged.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import contest, figures, ragged_mix
from benchmarks.contestants import SIZES, Ours, t5
from benchmarks.ragged_mix import TARGET_LIMIT, TEXT_LIMIT
from mpt_jax.batching import collate

B = 8
BANKS = (1, 10, 100, 1_000, 10_000)
PROMPT_LENGTHS = (0, 20, 100, 200, 400)
K, P = 6, 100  # in curves where they do not vary


class Point(NamedTuple):
    """Settings of a step.

    Attributes:
        tasks: K.
        prompt_length: P.
        packed: whether several texts share a row.
        distilled: whether the loss has distillation terms.
        held: whether tasks that are not in the batch stay unchanged.
        cached: whether teacher outputs are cached; after the warm-up, for all examples.
    """

    tasks: int = K
    prompt_length: int = P
    packed: bool = False
    distilled: bool = False
    held: bool = False
    cached: bool = False

    @property
    def name(self) -> str:
        """Name on the command line."""
        return ",".join(str(int(value)) for value in self)

    @classmethod
    def of_name(cls, name: str) -> Point:
        """Parses a `name`."""
        tasks, prompt_length, *switches = map(int, name.split(","))
        return cls(tasks, prompt_length, *map(bool, switches))


def curves(banks: list[int], lengths: list[int]) -> dict[str, list[Point]]:
    """Returns the curves: title -> points to compare."""
    found = {"tasks, unpacked, absent ones held": [Point(tasks=k, held=True) for k in banks]}
    for packed in (False, True):
        how = "packed" if packed else "unpacked"
        found[f"tasks, {how}"] = [Point(tasks=k, packed=packed) for k in banks]
        found[f"prompt length, {how}"] = [Point(prompt_length=p, packed=packed) for p in lengths]
        found[f"distillation, {how}"] = [Point(packed=packed, distilled=d) for d in (False, True)]
    found["distillation, unpacked"].append(Point(distilled=True, cached=True))
    return found


def batch(point: Point, vocabulary: int) -> collate.Batch:
    """Returns the batch of a step."""
    drawn = np.random.default_rng(0).integers(point.tasks, size=B)
    examples = [
        example._replace(row=int(row))
        for example, row in zip(
            ragged_mix.examples(ragged_mix.draw(B), vocabulary), drawn, strict=True
        )
    ]
    if not point.packed:
        return collate.unpacked(examples, point.prompt_length, TEXT_LIMIT, TARGET_LIMIT)
    row = {"inputs": 2 * (TEXT_LIMIT + point.prompt_length), "targets": 2 * TARGET_LIMIT}
    return collate.packed(examples, point.prompt_length, row)


def work(point: Point, size: str) -> contest.Work:
    """Returns a turn: one step."""
    config = t5(size)
    absent = "hold" if point.held else "dense"
    side = Ours(config, point.prompt_length, point.tasks, point.distilled, absent, point.cached)
    made = batch(point, config.vocab_size)

    def run() -> None:
        side.step(made)
        side.wait()

    return contest.Work(run, side.peak_mib)


def measure(points: list[Point], size: str, turns: int) -> list[dict[str, Any]]:
    """Measures the points of a curve."""
    given = ["benchmarks.scaling", "--size", size]
    commands = {point.name: [*given, "--serve", point.name] for point in points}
    found = contest.compare(commands, turns)
    return [
        {**point._asdict(), "positions": batch(point, 512)["encoder_input_tokens"].size}
        | found[point.name]
        for point in points
    ]


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """Returns a table of one curve."""
    columns = {
        "K": "tasks",
        "P": "prompt_length",
        "distilled": "distilled",
        "cached": "cached",
        "positions": "positions",
        "seconds a step": "median_seconds",
        "min": "min_seconds",
        "max": "max_seconds",
        "peak MiB": "peak_mib",
        "warm-up s": "warm_up_seconds",
    }
    cells = [[row[field] for field in columns.values()] for row in rows]
    return f"\n{title}\n\n{figures.table(list(columns), cells)}"


def main() -> None:
    """Prints a table for each curve, and writes the figures to --out if given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--banks", nargs="+", type=int, default=list(BANKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(PROMPT_LENGTHS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.serve:
        point = Point.of_name(args.serve)
        contest.serve(lambda: work(point, args.size), warm_ups=2)
        return
    record: dict[str, Any] = {"batch_size": B, "size": args.size, "machine": figures.machine()}
    record["mix"] = ragged_mix.description(ragged_mix.draw(B))
    record["curves"] = {}
    for title, points in curves(args.banks, args.lengths).items():
        rows = measure(points, args.size, args.turns)
        print(markdown(title, rows), flush=True)
        record["curves"][title] = rows
        figures.write(record, args.out)


if __name__ == "__main__":
    main()
