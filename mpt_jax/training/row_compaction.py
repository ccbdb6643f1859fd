"""Batch compaction: only rows of active runs are sent to the devices.

In a job of independent runs, each of K runs has an equal, contiguous share of every batch of B rows
(`sampling.EqualQuotas`). The batch consists of equal blocks, one on each shard of the mesh's data
axis. Rows of finished runs are left out. The other rows move to the front of their block, and all
blocks are padded to one capacity: the block size, halved zero or more times. A step therefore costs
what its fullest block costs, within a factor of two (unless the number of microbatches prevents a
halving), and is recompiled once per halving.

Rows never change their block: if prompts are sharded by runs, every example stays on the shard of
its prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mpt_jax.core.batch import TASK_IDS, num_rows, row_task_ids
from mpt_jax.core.runs import Runs


@dataclasses.dataclass(frozen=True)
class RowCompactor:
    """Removes the rows of finished runs from this process's blocks of a batch.

    Attributes:
        runs: the K runs of the job, in the order of their shares of a batch.
        shards: the number of blocks in a batch, over all processes.
        first_shard: the index of this process's first block.
        local_shards: the number of this process's blocks, which are consecutive.
        num_microbatches: the number of microbatches of a step. The number of rows of a halved block
            is always a multiple of it.
    """

    runs: Runs
    shards: int = 1
    first_shard: int = 0
    local_shards: int = 1
    num_microbatches: int = 1

    def owners(self, batch_size: int) -> np.ndarray:
        """Returns the bank row that each row of a full batch belongs to, [shards, B / shards].

        Raises:
            ValueError: B is not a multiple of the number of runs, or of the number of shards.
        """
        rows = self.runs.num_rows
        if batch_size % rows or batch_size % self.shards:
            raise ValueError(
                f"A batch of {batch_size} rows cannot be divided evenly among {rows} runs and over "
                f"{self.shards} shards of the mesh. Set BATCH_SIZE to a multiple of both {rows} "
                f"and {self.shards}."
            )
        return np.repeat(np.arange(rows), batch_size // rows).reshape(self.shards, -1)

    def capacities(self, batch_size: int) -> list[int]:
        """Returns the possible numbers of rows per block, in descending order from B / shards."""
        sizes = [batch_size // self.shards]
        while sizes[-1] % (2 * self.num_microbatches) == 0:
            sizes.append(sizes[-1] // 2)
        return sizes

    def pack(
        self, batch: Mapping[str, np.ndarray], active: Sequence[bool] | np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns this process's rows of a batch, without the rows of inactive groups.

        Padding rows have no tokens. Their task id is that of an active run in the same block, so
        that parameters of inactive runs are not read. If a block has no active run, their task id
        is that of its first run. The parameters of that run are then read with weight zero, and do
        not affect any other run.

        Args:
            batch: all of this process's rows of a batch, not packed.
            active: whether each group [G] is active; the same on all processes.

        Raises:
            ValueError: the rows of the batch are not in the order of the runs.
        """
        rows = num_rows(batch)
        whole = rows * self.shards // self.local_shards
        owners = self.owners(whole)
        own_blocks = slice(self.first_shard, self.first_shard + self.local_shards)
        task_ids = row_task_ids(batch)
        expected = owners[own_blocks].ravel()
        if (task_ids != expected).any():
            row = int(np.flatnonzero(task_ids != expected)[0])
            here, there = (self.runs.run_names[int(ids[row])] for ids in (task_ids, expected))
            raise ValueError(
                f"Row {row} of the batch is from run {here!r}, but in the order of RUN_NAMES it "
                f"must be from run {there!r}. Otherwise, the rows of finished runs cannot be found "
                "by their position. Set SAMPLER to @sampling.EqualQuotas(), with the runs in the "
                "order of RUN_NAMES."
            )
        is_active = np.asarray(active)[np.asarray(self.runs.group_of_row)][owners]
        needed = is_active.sum(axis=1).max()
        capacity = min(size for size in self.capacities(whole) if size >= needed)
        if capacity == owners.shape[1]:
            return dict(batch)
        blocks = [
            _compacted(owners[shard], is_active[shard], (shard - self.first_shard), capacity)
            for shard in range(own_blocks.start, own_blocks.stop)
        ]
        indices, empty, names = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        packed = {name: value[indices] for name, value in batch.items()}
        for name, value in packed.items():
            ids = names[empty].reshape(-1, *[1] * (value.ndim - 1))
            value[empty] = ids if name in TASK_IDS else 0
        return packed


def _compacted(
    owners: np.ndarray, is_active: np.ndarray, block: int, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns three arrays with one entry per row of a compacted block: its index among the
    process's rows, whether it is padding, and its bank row."""
    kept = np.flatnonzero(is_active)
    missing = capacity - len(kept)
    indices = np.concatenate([kept, np.full(missing, kept[0] if len(kept) else 0)])
    empty = np.arange(capacity) >= len(kept)
    return block * len(owners) + indices, empty, owners[indices]
