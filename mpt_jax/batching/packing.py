"""Best-fit packing: which examples of a window share a row.

The longest examples are placed first. SeqIO packs in order of arrival instead: it keeps one row
open and closes it at the first example that does not fit (docs/performance.md compares them).
"""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, capacity: tuple[int, int]) -> list[list[int]]:
    """Assigns examples to as few rows as best fit finds.

    Examples are placed longest first, each into the fitting row with the least encoder positions
    left. Rows are ordered by their first example, and the examples of a row by index, so a window
    keeps its order as far as packing allows.

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
            f"An example needs {worst[0]} encoder and {worst[1]} target positions, but a packed "
            f"row has {capacity[0]} and {capacity[1]}. Raise pack_lengths."
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
