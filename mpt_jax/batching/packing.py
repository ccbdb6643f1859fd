"""Which examples share a row.

Packing is a choice of rows and nothing else: best fit, the longest example first, over a window
of examples that are at hand. First-come packing, as SeqIO does it, keeps one row open and closes
it at the first example that does not fit (docs/performance.md compares them).
"""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, capacity: tuple[int, int]) -> list[list[int]]:
    """Puts examples into as few rows as best fit finds.

    The longest goes first, into the row that it leaves the least room in. Rows come in the order
    of their first examples, and so do the examples of a row: a window keeps its order as far as
    packing lets it.

    Args:
        lengths: [N, 2] encoder positions (prompt included) and target positions of each example.
        capacity: (T, L), the positions of a row.

    Returns:
        The indices of the examples of each row.

    Raises:
        ValueError: an example is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    room = np.asarray(capacity, np.int64)
    if (lengths > room).any():
        worst = lengths[(lengths > room).any(axis=1)][0].tolist()
        raise ValueError(
            f"An example needs {worst[0]} encoder and {worst[1]} target positions, and a packed "
            f"row has {capacity[0]} and {capacity[1]}. Raise pack_lengths."
        )
    # A row may be needed for every example; those not begun yet have all their room.
    left = np.tile(room, (len(lengths), 1))
    rows: list[list[int]] = []
    for index in np.argsort(-lengths[:, 0], kind="stable").tolist():
        need = lengths[index]
        fits = (left[: len(rows)] >= need).all(axis=1)
        chosen = int(np.where(fits, left[: len(rows), 0], np.inf).argmin()) if fits.any() else -1
        if chosen < 0:
            chosen = len(rows)
            rows.append([])
        rows[chosen].append(index)
        left[chosen] -= need
    return sorted(sorted(row) for row in rows)
