"""Tokenized texts of several tasks, of which any examples can be collected at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mpt_jax.batching.collate import Ragged

SIDES = ("inputs", "targets")
# Tables up to this size are copied into one array, from which one operation collects the examples
# of many small tasks. Larger tables stay where they are, perhaps in a file.
_JOINED_BYTES = 2**22


class TextTable(NamedTuple):
    """The texts of one side of a task, one after another.

    Attributes:
        values: the token ids of all texts [N].
        offsets: where each text starts, and where the last one ends [n + 1].
    """

    values: np.ndarray
    offsets: np.ndarray


class TaskTexts:
    """Inputs and targets of the examples of K tasks.

    Args:
        tables: the `inputs` and `targets` of each task.

    Attributes:
        sizes: the number of examples of each task [K].
    """

    def __init__(self, tables: Sequence[Mapping[str, TextTable]]):
        self.sizes = np.array([len(table["inputs"].offsets) - 1 for table in tables])
        self._firsts = np.cumsum(self.sizes) - self.sizes
        self._sides = {side: _Side([table[side] for table in tables]) for side in SIDES}

    def lengths(self, side: str, tasks: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Returns the number of tokens of these examples of these tasks."""
        return self._sides[side].lengths[self._firsts[tasks] + examples]

    def collect(self, side: str, tasks: np.ndarray, examples: np.ndarray) -> Ragged:
        """Returns the tokens of these examples of these tasks."""
        return self._sides[side].collect(tasks, self._firsts[tasks] + examples)


class _Side:
    """The texts of one side of all tasks."""

    def __init__(self, tables: Sequence[TextTable]):
        self.lengths = np.concatenate([np.diff(table.offsets) for table in tables]).astype(np.int32)
        small = [table.values.nbytes <= _JOINED_BYTES for table in tables]
        joined = [table.values for table, is_small in zip(tables, small, strict=True) if is_small]
        self._arrays = [np.concatenate([np.empty(0, np.int32), *joined])]
        self._array_of_task = np.zeros(len(tables), np.int64)
        starts, end = [], 0
        for number, (table, is_small) in enumerate(zip(tables, small, strict=True)):
            starts.append(table.offsets[:-1] + (end if is_small else 0))
            if is_small:
                end += len(table.values)
            else:
                self._array_of_task[number] = len(self._arrays)
                self._arrays.append(table.values)
        self._starts = np.concatenate(starts)

    def collect(self, tasks: np.ndarray, indices: np.ndarray) -> Ragged:
        lengths = self.lengths[indices].astype(np.int64)
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        source = np.arange(total) + np.repeat(self._starts[indices] - ends + lengths, lengths)
        arrays = self._array_of_task[tasks]
        used = np.unique(arrays).tolist()
        if len(used) == 1:
            return Ragged(self._arrays[used[0]][source], lengths)
        values, arrays = np.empty(total, np.int32), np.repeat(arrays, lengths)
        for number in used:
            own = arrays == number
            values[own] = self._arrays[number][source[own]]
        return Ragged(values, lengths)
