"""Best-fit packing of the examples of windows into rows.

The longest examples are placed first. SeqIO packs in order of arrival: it keeps one row open and
closes it at the first example that does not fit (docs/performance.md compares the two).
"""

from __future__ import annotations

import numpy as np

_WIDER = 32  # rows that are added when all rows of a window are open


def best_fit(lengths: np.ndarray, capacity: tuple[int, int]) -> np.ndarray:
    """Assigns the examples of a window to rows by the best-fit heuristic, which keeps the number of
    rows low; the windows of a stack independently.

    Examples are placed in order of decreasing encoder length. Each is placed into the row that has
    the fewest encoder positions left but still has room for the example. Rows are ordered by their
    first example, so a window keeps its order as far as packing allows.

    Args:
        lengths: the number of encoder positions (prompt slots included) and of target positions of
            each example, at least 1 each.
        capacity: the number of encoder and of target positions of a row, (T, L).

    Returns:
        The row of each example, from 0 in each window.

    Raises:
        ValueError: an example is longer than a row.
    """
    lengths = np.asarray(lengths)
    if (lengths > capacity).any():
        worst = lengths[(lengths > capacity).any(axis=-1)][0].tolist()
        raise ValueError(
            f"An example needs {worst[0]} encoder and {worst[1]} target positions, but a packed "
            f"row has {capacity[0]} and {capacity[1]}. Use longer rows (PACK_LENGTHS) or shorter "
            "examples (TASK_FEATURE_LENGTHS)."
        )
    windows = lengths.reshape(-1, *lengths.shape[-2:])
    return _by_first_example(_opened(windows, capacity)).reshape(lengths.shape[:-1])


def _opened(lengths: np.ndarray, capacity: tuple[int, int]) -> np.ndarray:
    """Returns the row of each example, numbered in the order in which rows are opened."""
    # All windows take a step together. Narrow integers make the steps of many windows fast.
    kind = np.int16 if max(capacity) < 2**15 - 1 else np.int64
    none = np.iinfo(kind).max
    number, count = lengths.shape[:2]
    windows = np.arange(number)
    order = np.argsort(-lengths[..., 0], axis=1, kind="stable")
    needed = np.take_along_axis(lengths, order[..., None], axis=1).transpose(1, 2, 0).astype(kind)
    left = [np.full((number, _WIDER), room, kind) for room in capacity]
    rows = np.empty((number, count), np.int64)
    for place in range(count):
        encoder, decoder = needed[place]
        fits = (left[0] >= encoder[:, None]) & (left[1] >= decoder[:, None])
        # A row that is not open has more room than any other, so it is chosen only if none fits.
        best = np.where(fits, left[0], none).argmin(axis=1)
        rows[windows, order[:, place]] = best
        left[0][windows, best] -= encoder
        left[1][windows, best] -= decoder
        if best.max() == left[0].shape[1] - 1:
            wider = [np.full((number, _WIDER), room, kind) for room in capacity]
            left = [np.concatenate(pair, axis=1) for pair in zip(left, wider, strict=True)]
    return rows


def _by_first_example(rows: np.ndarray) -> np.ndarray:
    """Numbers the rows of each window by their first examples."""
    number, count = rows.shape
    first = np.full((number, count), count)
    np.minimum.at(first, (np.arange(number)[:, None], rows), np.arange(count))
    renamed = np.empty_like(rows)
    np.put_along_axis(renamed, np.argsort(first, axis=1), np.arange(count)[None], axis=1)
    return np.take_along_axis(renamed, rows, axis=1)
