"""Computed encoder positions per example, by method of batching.

    python -m benchmarks.positions [--examples 8192] [--out docs/benchmarks/positions.json]

The ragged mix of benchmarks/ragged_mix.py, with assumed lengths, at three prompt lengths. A
position is one of the T positions of a batch row, including prompt and padding. All costs except
attention are proportional to positions. A window is the number of examples to choose from. Packed
rows have 32 target positions for every 256 + P encoder positions, so targets do not limit packing.
Positions are counted, not timed.
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
    """Returns encoder and target positions of a packed row."""
    return int(times * (TEXT_LIMIT + prompt_length)), int(times * ROW_TARGETS)


def needs(mix: Mix, prompt_length: int) -> np.ndarray:
    """Returns [N, 2] encoder positions (with prompt) and target positions of each example."""
    return np.stack([mix.inputs + prompt_length, mix.targets], axis=1)


def in_batches(
    lengths: np.ndarray, batches: Iterator[np.ndarray], round_up: Callable[[int], int]
) -> int:
    """Counts positions of unpacked batches that are as long as their longest example.

    Args:
        lengths: [N] lengths of texts.
        batches: indices of the examples of each batch.
        round_up: length of the longest text -> length of the batch.
    """
    return sum(len(batch) * round_up(int(lengths[batch].max())) for batch in batches)


def unsorted(count: int, batch_size: int = BATCH) -> Iterator[np.ndarray]:
    """Yields indices of each batch in arrival order."""
    return (np.arange(at, min(at + batch_size, count)) for at in range(0, count, batch_size))


def to_multiple(multiple: int) -> Callable[[int], int]:
    """Returns a function that rounds up to a multiple, at most to the limit of texts."""
    return lambda length: min(TEXT_LIMIT, -(-length // multiple) * multiple)


def next_fit(lengths: np.ndarray, room: tuple[int, int]) -> int:
    """Counts rows of SeqIO's packing. One row is open at a time, and the first example that does
    not fit closes it.

    Args:
        lengths: [N, 2], see `needs`.
        room: encoder and target positions of a row.
    """
    rows, left = 0, np.zeros(2, int)
    for need in lengths:
        if rows == 0 or (need > left).any():
            rows, left = rows + 1, np.array(room)
        left = left - need
    return rows


def best_fit(lengths: np.ndarray, room: tuple[int, int], window: int) -> int:
    """Counts rows of our packing, one window at a time."""
    parts = (lengths[at : at + window] for at in range(0, len(lengths), window))
    return sum(int(packing.best_fit(part, room).max()) + 1 for part in parts)


def count(mix: Mix, prompt_length: int) -> dict[str, float]:
    """Returns positions per example for every method of batching."""
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
    """Returns a table of positions per example, and ratios to the ideal."""
    header = ["", *(f"P = {length}" for length in found)]
    ideal = {length: min(by_method.values()) for length, by_method in found.items()}
    rows: list[Sequence[object]] = [
        [name, *(f"{found[p][name]:.1f} ({found[p][name] / ideal[p]:.2f}x)" for p in found)]
        for name in next(iter(found.values()))
    ]
    return figures.table(header, rows)


def main() -> None:
    """Prints a table, and writes the figures to --out if given."""
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
