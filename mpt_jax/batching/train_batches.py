"""Training batches of tokenized texts, of which every host makes only its own rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from mpt_jax.batching import bucketing, collate
from mpt_jax.batching.arrangements import Arrangement, Examples
from mpt_jax.batching.bucketing import LengthBuckets
from mpt_jax.batching.collate import Batch
from mpt_jax.batching.task_texts import TaskTexts


@dataclasses.dataclass(frozen=True)
class Layout:
    """The form of batches.

    Attributes:
        banks: the bank row of each task [K].
        prompt_lengths: the number of prompt slots of an example of each task [K].
        shape: the numbers of rows, of encoder and of decoder positions.
        packed: whether rows hold several examples.
        buckets: the lengths that batches are trimmed to; None for one length.
    """

    banks: np.ndarray
    prompt_lengths: np.ndarray
    shape: tuple[int, int, int]
    packed: bool = False
    buckets: LengthBuckets | None = None


class TrainBatches(Iterator[Batch]):
    """A host's rows of the training batches.

    The examples of all rows are known on every host, from indices and lengths. Only tokens of the
    host's own rows are read.

    Args:
        texts: the texts of the tasks.
        arrangement: the examples of each global batch.
        layout: the form of batches; its rows are those of all hosts.
        num_hosts: the number of hosts, which divides the number of rows.
        host_index: the index of this host.
    """

    def __init__(
        self,
        texts: TaskTexts,
        arrangement: Arrangement,
        layout: Layout,
        num_hosts: int = 1,
        host_index: int = 0,
    ):
        self._texts, self.arrangement, self._layout = texts, arrangement, layout
        self._rows = layout.shape[0] // num_hosts
        self._first = self._rows * host_index

    def __next__(self) -> Batch:
        return self.collect(next(self.arrangement))

    def collect(self, examples: Examples) -> Batch:
        """Returns this host's rows of a batch, given the examples of all its rows."""
        shape = (self._rows, *self._lengths(examples))
        tasks, indices, places = examples.of_rows(self._first, self._first + self._rows)
        inputs = self._texts.collect("inputs", tasks, indices)
        targets = self._texts.collect("targets", tasks, indices)
        banks, prompts = self._layout.banks[tasks], self._layout.prompt_lengths[tasks]
        if self._layout.packed:
            return collate.packed_rows(inputs, targets, banks, prompts, places, shape)
        return collate.unpacked_rows(inputs, targets, banks, prompts, shape)

    def _lengths(self, examples: Examples) -> tuple[int, int]:
        """Returns the numbers of encoder and decoder positions of a batch."""
        buckets = self._layout.buckets
        if buckets is None:
            return self._layout.shape[1:]
        tasks, indices, _ = examples
        inputs, targets = (
            self._texts.lengths(side, tasks, indices) for side in ("inputs", "targets")
        )
        encoder = (self._layout.prompt_lengths[tasks] + inputs).max(initial=0)
        return (
            bucketing.smallest(buckets.encoder, int(encoder)),
            bucketing.smallest(buckets.decoder, int(targets.max(initial=0))),
        )
