"""Batches of tokenized texts, of which every host makes only its own rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from mpt_jax.batching import bucketing, collate
from mpt_jax.batching.arrangements import Arrangement, Examples, one_per_row
from mpt_jax.batching.bucketing import LengthBuckets
from mpt_jax.batching.collate import Batch
from mpt_jax.batching.task_texts import TaskTexts


@dataclasses.dataclass(frozen=True)
class Layout:
    """The form of batches, and which rows of them a host makes.

    Attributes:
        banks: the bank row of each task [K].
        prompt_lengths: the number of prompt slots of an example of each task [K].
        shape: the numbers of rows of all hosts, of encoder and of decoder positions.
        packed: whether rows hold several examples.
        buckets: the lengths that batches are trimmed to; None for one length.
        trim_targets: whether targets are trimmed as well; decoding may need all their positions.
        num_hosts: the number of hosts, which divides the number of rows.
        host_index: the index of this host.
    """

    banks: np.ndarray
    prompt_lengths: np.ndarray
    shape: tuple[int, int, int]
    packed: bool = False
    buckets: LengthBuckets | None = None
    trim_targets: bool = True
    num_hosts: int = 1
    host_index: int = 0


def collect(texts: TaskTexts, layout: Layout, examples: Examples) -> Batch:
    """Returns this host's rows of a batch, given the examples of all its rows. Only tokens of the
    host's own rows are read; rows without an example are zeros."""
    rows = layout.shape[0] // layout.num_hosts
    first = rows * layout.host_index
    shape = (rows, *_lengths(texts, layout, examples))
    tasks, indices, places = examples.of_rows(first, first + rows)
    inputs = texts.collect("inputs", tasks, indices)
    targets = texts.collect("targets", tasks, indices)
    banks, prompts = layout.banks[tasks], layout.prompt_lengths[tasks]
    if layout.packed:
        return collate.packed_rows(inputs, targets, banks, prompts, places, shape)
    return collate.unpacked_rows(inputs, targets, banks, prompts, shape)


def _lengths(texts: TaskTexts, layout: Layout, examples: Examples) -> tuple[int, int]:
    """Returns the numbers of encoder and decoder positions of a batch."""
    _, encoder, decoder = layout.shape
    if layout.buckets is None:
        return encoder, decoder
    tasks, indices, _ = examples
    needed = (layout.prompt_lengths[tasks] + texts.lengths("inputs", tasks, indices)).max(initial=0)
    encoder = bucketing.smallest(layout.buckets.encoder, int(needed))
    if layout.trim_targets:
        needed = texts.lengths("targets", tasks, indices).max(initial=0)
        decoder = bucketing.smallest(layout.buckets.decoder, int(needed))
    return encoder, decoder


class TrainBatches(Iterator[Batch]):
    """A host's rows of the training batches.

    Args:
        texts: the texts of the tasks.
        arrangement: the examples of each global batch, which are known on every host.
        layout: the form of batches.
    """

    def __init__(self, texts: TaskTexts, arrangement: Arrangement, layout: Layout):
        self._texts, self.arrangement, self._layout = texts, arrangement, layout

    def __next__(self) -> Batch:
        return collect(self._texts, self._layout, next(self.arrangement))


class EvalBatches:
    """A host's rows of batches with every example of the tasks once, in order; with buckets, sorted
    by the length of inputs within some batches. They can be iterated over repeatedly.

    Args:
        texts: the texts of the tasks.
        layout: the form of batches.
    """

    def __init__(self, texts: TaskTexts, layout: Layout):
        self._texts, self._layout = texts, layout

    def __call__(self) -> Iterator[Batch]:
        """Yields the batches."""
        return (batch for _, batch in self.numbered())

    def numbered(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yields (indices, batch) pairs. The indices give the places of the examples of all hosts'
        rows among those of all tasks; the batch has only this host's rows."""
        sizes, size = self._texts.sizes, self._layout.shape[0]
        tasks = np.repeat(np.arange(len(sizes)), sizes)
        indices = np.arange(len(tasks)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = iter(np.array_split(np.arange(len(tasks)), range(size, len(tasks), size)))
        if self._layout.buckets:
            lengths = self._texts.lengths("inputs", tasks, indices)
            order = bucketing.sorted_batches(self._layout.prompt_lengths[tasks] + lengths, size)
        for rows in order:
            examples = one_per_row(tasks[rows], indices[rows])
            yield rows, collect(self._texts, self._layout, examples)
