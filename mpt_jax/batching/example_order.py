"""The order in which training reads the examples of several tasks.

Every task has an endless stream of its examples, in which each pass is a permutation that depends
only on (seed, stream, pass). A sampler says from which streams the examples of a batch are taken.
Only indices are computed, for all tasks at once, so a host that keeps few rows of a large batch
pays little for the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpt_jax.batching import random_bits
from mpt_jax.batching.samplers import Sampler

# Number of draws, and of examples of a task, that are computed at a time: enough to spread the cost
# of a call, and few enough for the first batch.
_AT_ONCE = 2**14


class ExampleOrder:
    """Endless examples of the tasks, in order, with a position that is one count for each task.

    Args:
        sampler: the sampler of the tasks.
        weights: the mixing weights of the tasks, for the sampler.
        sizes: the number of examples of each task.
        streams: the number of each task's stream; streams with one number have one order.
        shuffle: whether each pass has a different order.

    Attributes:
        taken: the number of examples that were taken.
        counts: the same, of each task [K].
    """

    def __init__(
        self,
        sampler: Sampler,
        weights: np.ndarray,
        sizes: np.ndarray,
        streams: Sequence[int],
        shuffle: bool,
    ):
        self._sampler, self._weights, self._shuffle = sampler, weights, shuffle
        self._sizes, self._streams = np.asarray(sizes, np.int64), tuple(streams)
        # Of each task, some passes in a row of `_order`: those of the places `_first` to `_end`.
        self._passes = np.maximum(_AT_ONCE // self._sizes, 1)
        rooms = self._passes * self._sizes
        self._starts = np.cumsum(rooms) - rooms
        self._order = np.empty(rooms.sum(), np.int32 if self._sizes.max() < 2**31 else np.int64)
        self.restore(0, np.zeros(len(self._sizes), np.int64))

    def restore(self, taken: int, counts: np.ndarray) -> None:
        """Continues after `taken` examples, of which `counts` [K] are of each task."""
        self.taken, self.counts = taken, np.array(counts, np.int64)
        self._drawn, self._first_drawn = np.empty(0, np.int64), taken
        self._first = np.zeros(len(self._sizes), np.int64)
        self._end = np.zeros(len(self._sizes), np.int64)  # no pass is known

    def skip_to(self, taken: int) -> None:
        """Continues after the first `taken` examples, from the draws alone."""
        self.restore(0, np.zeros(len(self._sizes), np.int64))
        while self.taken < taken:
            tasks = self._tasks(min(taken - self.taken, _AT_ONCE))
            self.counts += np.bincount(tasks, minlength=len(self.counts))
            self.taken += len(tasks)

    def take(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tasks [number] of the next examples, and their indices in their tasks."""
        tasks = self._tasks(number)
        places = self.counts[tasks] + _ranks(tasks)
        self.counts += np.bincount(tasks, minlength=len(self.counts))
        self.taken += number
        examples = np.empty(number, np.int64)
        missing = np.arange(number)
        while missing.size:
            task, place = tasks[missing], places[missing]
            known = place < self._end[task]
            at = self._starts[task] + place - self._first[task]
            examples[missing[known]] = self._order[at[known]]
            missing = missing[~known]
            for task_number in np.unique(task[~known]).tolist():
                self._read_ahead(task_number, int(place[~known & (task == task_number)].min()))
        return tasks, examples

    def _tasks(self, number: int) -> np.ndarray:
        """Returns the tasks of the next examples [number]."""
        end, size = self.taken + number, self._sampler.batch_size
        if end > self._first_drawn + len(self._drawn):
            first = self.taken // size
            steps = np.arange(first, max(-(-end // size), first + _AT_ONCE // size))
            self._drawn = self._sampler.draw(steps, self._weights).ravel()
            self._first_drawn = first * size
        return self._drawn[self.taken - self._first_drawn :][:number]

    def _read_ahead(self, task: int, place: int) -> None:
        """Computes the order of a task's examples from the pass of `place` on."""
        size, passes = int(self._sizes[task]), int(self._passes[task])
        first = place // size
        rows = self._order[self._starts[task] :][: passes * size].reshape(passes, size)
        if self._shuffle:
            numbers = np.arange(first, first + passes)
            seed, stream = self._sampler.seed, self._streams[task]
            rows[:] = random_bits.permutations(seed, stream, numbers, size)
        else:
            rows[:] = np.arange(size)
        self._first[task], self._end[task] = first * size, (first + passes) * size


def _ranks(tasks: np.ndarray) -> np.ndarray:
    """Returns how many examples of the same task come before each example."""
    # NumPy sorts 16-bit integers in linear time.
    narrow = tasks.astype(np.int16) if tasks.max() < 2**15 else tasks
    order = np.argsort(narrow, kind="stable")
    in_order = tasks[order]
    new = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))
    ranks = np.empty(len(tasks), np.int64)
    ranks[order] = np.arange(len(tasks)) - np.repeat(new, np.diff(np.append(new, len(tasks))))
    return ranks
