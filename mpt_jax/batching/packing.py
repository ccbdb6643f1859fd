"""Best-fit packing of the examples of a window into rows.

The longest examples are placed first. SeqIO packs in order of arrival: it keeps one row open and
closes it at the first example that does not fit (docs/performance.md compares the two).
"""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, capacity: tuple[int, int]) -> list[list[int]]:
    """Assigns examples to rows by the best-fit heuristic, which keeps the number of rows low.

    Examples are placed in order of decreasing encoder length. Each is placed into the row that has
    the fewest encoder positions left but still has room for the example. Rows are ordered by their
    first example, and the examples of a row by index, so a window keeps its order as far as packing
    allows.

    Args:
        lengths: the number of encoder positions (prompt slots included) and of target positions of
            each example, [n, 2].
        capacity: the number of encoder and of target positions of a row, (T, L).

    Returns:
        For each row, the indices of its examples.

    Raises:
        ValueError: an example is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    room = np.asarray(capacity, np.int64)
    if (lengths > room).any():
        worst = lengths[(lengths > room).any(axis=1)][0].tolist()
        raise ValueError(
            f"An example needs {worst[0]} encoder and {worst[1]} target positions, but a packed "
            f"row has {capacity[0]} and {capacity[1]}. Use longer rows (PACK_LENGTHS) or shorter "
            "examples (TASK_FEATURE_LENGTHS)."
        )
    # Each example may need its own row. Rows that are still empty have all their room.
    left = np.tile(room, (len(lengths), 1))
    rows: list[list[int]] = []
    for index in np.argsort(-lengths[:, 0], kind="stable").tolist():
        need = lengths[index]
        fits = (left[: len(rows)] >= need).all(axis=1)
        best = int(np.where(fits, left[: len(rows), 0], np.inf).argmin()) if fits.any() else -1
        if best < 0:
            best = len(rows)
            rows.append([])
        rows[best].append(index)
        left[best] -= need
    return sorted(sorted(row) for row in rows)
