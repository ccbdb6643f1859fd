"""Encoder positions computed for an example, by how examples are put into batches.

    python -m benchmarks.positions [--examples 8192] [--out docs/benchmarks/positions.json]

The ragged mix of benchmarks/ragged_mix.py, whose lengths are assumed, at three prompt lengths. A
position is one of the T that a row of a batch has, prompt and padding included: all but attention
costs by it. A window is how many examples are at hand at once. Packed rows have 32 target positions
for every 256 + P encoder positions, enough for targets not to decide. Counted, not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks import figures, ragged_mix
from benchmarks.ragged_mix import TEXT_LIMIT, Mix
from mpt_jax.batching import bucketing, packing

BATCH = 32
PROMPT_LENGTHS = (0, 20, 100)
MULTIPLES = (32, 64)
WINDOWS = (128, 256, 512, 1024)
ROWS = (1.0, 1.5, 2.0, 3.0)  # times 256 + P
ROW_TARGETS = 32  # in a row of 1x


def capacity(prompt_length: int, times: float) -> tuple[int, int]:
    """Encoder and target positions of a packed row."""
    return int(times * (TEXT_LIMIT + prompt_length)), int(times * ROW_TARGETS)


def needs(mix: Mix, prompt_length: int) -> np.ndarray:
    """[N, 2] encoder positions, prompt included, and target positions of each example."""
    return np.stack([mix.inputs + prompt_length, mix.targets], axis=1)


def in_batches(
    lengths: np.ndarray, batches: Iterator[np.ndarray], round_up: Callable[[int], int]
) -> int:
    """Positions of unpacked batches as long as their longest example.

    Args:
        lengths: [N] of texts.
        batches: the examples of each.
        round_up: the longest text's tokens -> those of the batch's rows.
    """
    return sum(len(batch) * round_up(int(lengths[batch].max())) for batch in batches)


def unsorted(count: int, batch_size: int = BATCH) -> Iterator[np.ndarray]:
    """The examples of each batch in the order they come."""
    return (np.arange(at, min(at + batch_size, count)) for at in range(0, count, batch_size))


def to_multiple(multiple: int) -> Callable[[int], int]:
    """Rounds up to a multiple, but never beyond the limit on texts."""
    return lambda length: min(TEXT_LIMIT, -(-length // multiple) * multiple)


def next_fit(lengths: np.ndarray, room: tuple[int, int]) -> int:
    """Rows that SeqIO's packing makes: one is open, and closed by the first example that does not
    fit.

    Args:
        lengths: [N, 2], see `needs`.
        room: positions of a row.
    """
    rows, left = 0, np.zeros(2, int)
    for need in lengths:
        if rows == 0 or (need > left).any():
            rows, left = rows + 1, np.array(room)
        left = left - need
    return rows


def best_fit(lengths: np.ndarray, room: tuple[int, int], window: int) -> int:
    """Rows that ours makes, a window at a time."""
    parts = (lengths[at : at + window] for at in range(0, len(lengths), window))
    return sum(len(packing.best_fit(part, room)) for part in parts)


def count(mix: Mix, prompt_length: int) -> dict[str, float]:
    """Positions an example of every method."""
    number = len(mix.inputs)
    exact = lambda length: length  # noqa: E731
    order = list(bucketing.sorted_batches(mix.inputs, BATCH))
    texts = {
        "padded to the limit": number * TEXT_LIMIT,
        "longest of the batch, unsorted": in_batches(mix.inputs, unsorted(number), exact),
        "longest of the batch, sorted": in_batches(mix.inputs, iter(order), exact),
    }
    for multiple in MULTIPLES:
        name = f"buckets of {multiple}, sorted"
        texts[name] = in_batches(mix.inputs, iter(order), to_multiple(multiple))
    found = {name: total / number + prompt_length for name, total in texts.items()}
    lengths = needs(mix, prompt_length)
    for times in ROWS:
        room = capacity(prompt_length, times)
        found[f"packed as SeqIO does, {times:g}x"] = next_fit(lengths, room) * room[0] / number
    for window in WINDOWS:
        for times in ROWS:
            room = capacity(prompt_length, times)
            rows = best_fit(lengths, room, window)
            found[f"packed by best fit, {times:g}x, window {window}"] = rows * room[0] / number
    found["ideal: no padding at all"] = float(lengths[:, 0].mean())
    return found


def markdown(found: dict[int, dict[str, float]]) -> str:
    """The table: positions an example, and times the ideal."""
    header = ["", *(f"P = {length}" for length in found)]
    ideal = {length: min(by_method.values()) for length, by_method in found.items()}
    rows: list[Sequence[object]] = [
        [name, *(f"{found[p][name]:.1f} ({found[p][name] / ideal[p]:.2f}x)" for p in found)]
        for name in next(iter(found.values()))
    ]
    return figures.table(header, rows)


def main() -> None:
    """Prints a table, and writes the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--examples", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mix = ragged_mix.draw(args.examples, args.seed)
    found = {length: count(mix, length) for length in PROMPT_LENGTHS}
    print(markdown(found))
    record = {"batch_size": BATCH, "mix": ragged_mix.description(mix), "positions": found}
    figures.write(record, args.out)


if __name__ == "__main__":
    main()
