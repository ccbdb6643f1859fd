"""Arrangements of examples in rows and of rows in batches, from lengths alone.

A window of examples is taken from the order of the mixture and arranged in rows. Batches are
consecutive rows. A position holds no examples: it is the place in the order where the current
window starts, and the number of its rows that were used.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mpt_jax.batching import bucketing, packing, random_bits
from mpt_jax.batching.collate import Places, packed_places
from mpt_jax.batching.example_order import ExampleOrder

# Examples that are packed at a time: the windows of large batches, and several for small ones.
_PACKED_AT_ONCE = 2**12


class Examples(NamedTuple):
    """Examples in rows, in the order of their rows.

    Attributes:
        tasks: the number of the task of each example [n].
        indices: the index of each example in its task [n].
        places: the place of each example.
    """

    tasks: np.ndarray
    indices: np.ndarray
    places: Places

    def of_rows(self, first: int, end: int) -> Examples:
        """Returns the examples of some rows, of which the first becomes row 0."""
        begin, stop = np.searchsorted(self.places.rows, [first, end]).tolist()
        rows, *others = (x[begin:stop] for x in self.places)
        return Examples(
            self.tasks[begin:stop], self.indices[begin:stop], Places(rows - first, *others)
        )


class Position(NamedTuple):
    """A place between two batches.

    Attributes:
        taken: the number of examples before the current window.
        counts: the same, of each task [K].
        rows: the number of rows of the window that were used.
    """

    taken: int
    counts: np.ndarray
    rows: int


class _Window(NamedTuple):
    start: Position
    examples: Examples
    num_rows: int


# (number of the first of some windows, tasks [n], indices [n]) -> examples in rows, number of rows
Arrange = Callable[[int, np.ndarray, np.ndarray], tuple[Examples, int]]


class Arrangement(Iterator[Examples]):
    """The examples of each batch in their rows, with a position.

    Args:
        order: the order in which examples are taken.
        batch_size: the number of rows of a batch.
        taken_at_once: the number of examples that are taken and arranged together.
        arrange: the function that arranges them.
        one_per_row: whether every row has one example.
    """

    def __init__(
        self,
        order: ExampleOrder,
        batch_size: int,
        taken_at_once: int,
        arrange: Arrange,
        one_per_row: bool = True,
    ):
        self._order, self._batch_size = order, batch_size
        self._taken_at_once, self._arrange = taken_at_once, arrange
        self._one_per_row = one_per_row
        self._windows: collections.deque[_Window] = collections.deque()
        self._used = 0  # rows of the first of the windows

    def __next__(self) -> Examples:
        while sum(x.num_rows for x in self._windows) - self._used < self._batch_size:
            self._windows.append(self._next_window())
        parts, missing = [], self._batch_size
        while missing:
            window = self._windows[0]
            end = min(self._used + missing, window.num_rows)
            parts.append((self._batch_size - missing, window.examples.of_rows(self._used, end)))
            missing -= end - self._used
            self._used = end
            if end == window.num_rows:
                self._windows.popleft()
                self._used = 0
        return _joined(parts)

    def _next_window(self) -> _Window:
        start = Position(self._order.taken, self._order.counts.copy(), 0)
        number = self._order.taken // self._taken_at_once
        return _Window(start, *self._arrange(number, *self._order.take(self._taken_at_once)))

    @property
    def position(self) -> Position:
        """The place before the next batch."""
        if self._windows:
            return self._windows[0].start._replace(rows=self._used)
        return Position(self._order.taken, self._order.counts.copy(), 0)

    def restore(self, position: Position) -> None:
        """Continues at a position.

        Raises:
            ValueError: it is no position of this arrangement.
        """
        taken, counts, rows = position
        known = len(counts) == len(self._order.counts)
        if not known or sum(counts.tolist()) != taken or taken % self._taken_at_once:
            raise ValueError(f"it has {counts.tolist()} of {taken} examples")
        if not 0 <= rows < self._taken_at_once:
            raise ValueError(f"it has {rows} rows of {self._taken_at_once} examples")
        self._order.restore(taken, counts)
        self._windows.clear()
        self._used = rows
        while sum(x.num_rows for x in self._windows) < self._used:
            self._windows.append(self._next_window())
            if self._windows[0].num_rows <= self._used:
                self._used -= self._windows.popleft().num_rows

    def skip_to(self, batches: int) -> None:
        """Continues after the first `batches`, which takes time in proportion to their number."""
        self._order.restore(0, np.zeros_like(self._order.counts))
        self._windows.clear()
        self._used = 0
        if self._one_per_row:
            windows, self._used = divmod(batches * self._batch_size, self._taken_at_once)
            self._order.skip_to(windows * self._taken_at_once)
        else:
            for _ in range(batches):
                next(self)


def _joined(parts: list[tuple[int, Examples]]) -> Examples:
    """Returns the examples of several parts of a batch, given the first row of each."""
    if len(parts) == 1:
        return parts[0][1]
    tasks, indices = (np.concatenate([x[side] for _, x in parts]) for side in (0, 1))
    rows = [x.places.rows + first for first, x in parts]
    others = [np.concatenate([x.places[i] for _, x in parts]) for i in (1, 2, 3)]
    return Examples(tasks, indices, Places(np.concatenate(rows), *others))


def unpacked(order: ExampleOrder, batch_size: int) -> Arrangement:
    """Returns the arrangement with an example in each row, in order."""

    def arrange(_, tasks, indices):
        return one_per_row(tasks, indices), len(tasks)

    return Arrangement(order, batch_size, batch_size, arrange)


def by_length(
    order: ExampleOrder,
    batch_size: int,
    lengths: Callable[[np.ndarray, np.ndarray], np.ndarray],
    shares: int,
    seed: int,
    stream: int,
) -> Arrangement:
    """Returns the arrangement that sorts the examples of `bucketing.WINDOW` batches by length, and
    shuffles the resulting batches.

    If tasks have equal shares of each batch, each task's examples are sorted separately. The shares
    then stay equal, and a run of a grouped job sees the same examples per batch as in a solo job.

    Args:
        order: the order in which examples are taken.
        batch_size: B, the number of examples in a batch.
        lengths: returns the lengths [n] of examples, given their tasks [n] and indices [n].
        shares: number of tasks with equal shares: each has B / shares contiguous examples of every
            batch, and their order is always the same. 1 if shares are not equal.
        seed, stream: the seed of the shuffling, and its stream of random numbers.
    """
    window, share = bucketing.WINDOW, batch_size // shares

    def to_shares(x: np.ndarray) -> np.ndarray:  # [window * B] -> [shares, window * share]
        return x.reshape(window, shares, share).swapaxes(0, 1).reshape(shares, window * share)

    def arrange(number, tasks, indices):
        by_share = np.argsort(to_shares(lengths(tasks, indices)), axis=1, kind="stable")
        sorted_ = np.take_along_axis(to_shares(np.arange(len(tasks))), by_share, axis=1)
        batches = sorted_.reshape(shares, window, share).swapaxes(0, 1)
        drawn = random_bits.uniform32(seed, stream, np.array([number]), window)[0]
        chosen = batches[np.argsort(drawn, kind="stable")].ravel()
        return one_per_row(tasks[chosen], indices[chosen]), len(chosen)

    return Arrangement(order, batch_size, window * batch_size, arrange)


def packed(
    order: ExampleOrder,
    batch_size: int,
    needed: Callable[[np.ndarray, np.ndarray], np.ndarray],
    capacity: tuple[int, int],
    window: int,
) -> Arrangement:
    """Returns the arrangement with several examples in each row.

    Args:
        order: the order in which examples are taken.
        batch_size: the number of rows of a batch.
        needed: returns the numbers of encoder and decoder positions of examples [n, 2], given
            their tasks [n] and indices [n].
        capacity: the number of encoder and of decoder positions of a row.
        window: the number of examples that are packed together.
    """
    together = max(_PACKED_AT_ONCE // window, 1)

    def arrange(number, tasks, indices):
        lengths = needed(tasks, indices)
        rows = packing.best_fit(lengths.reshape(together, window, 2), capacity)
        before = np.cumsum(rows.max(axis=1) + 1) - rows.max(axis=1) - 1
        rows = (rows + before[:, None]).ravel()
        places, by_row = packed_places(rows, lengths), np.argsort(rows, kind="stable")
        in_order = Places(*(x[by_row] for x in places))
        return Examples(tasks[by_row], indices[by_row], in_order), int(rows.max()) + 1

    return Arrangement(order, batch_size, together * window, arrange, one_per_row=False)


def one_per_row(tasks: np.ndarray, indices: np.ndarray) -> Examples:
    """Returns examples with a row for each, given their tasks [n] and indices [n]."""
    zeros = np.zeros(len(tasks), np.int64)
    return Examples(tasks, indices, Places(np.arange(len(tasks)), zeros, zeros, zeros))
