"""Batch compaction: only rows of active runs are sent to the devices.

In a job of independent runs each of K runs has an equal, contiguous share of every batch of B rows
(`sampling.EqualQuotas`). The batch consists of equal blocks, one on each shard of the mesh's data
axis. Rows of finished runs are left out. The other rows move to the front of their block, and all
blocks are padded to one capacity: the block size, halved zero or more times. So a step costs what
its active runs cost, within a factor of two, and is recompiled once per halving.

Rows never change their block: if prompts are sharded by runs, every example stays on the shard of
its prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mpt_jax.core.runs import Runs


@dataclasses.dataclass(frozen=True)
class RowCompactor:
    """Leaves the rows of finished runs out of this process's blocks of a batch.

    Attributes:
        runs: the K rows of the bank, in the order of their shares.
        shards: number of blocks of a batch, over all processes.
        first_shard: index of this process's first block.
        local_shards: number of this process's blocks, which are consecutive.
        num_microbatches: divides every capacity.
    """

    runs: Runs
    shards: int = 1
    first_shard: int = 0
    local_shards: int = 1
    num_microbatches: int = 1

    def owners(self, batch_size: int) -> np.ndarray:
        """Returns the bank row of every row of a batch, [shards, B / shards].

        Raises:
            ValueError: B is not a multiple of the runs, or of the blocks.
        """
        rows = self.runs.num_rows
        if batch_size % rows or batch_size % self.shards:
            raise ValueError(
                f"A batch of {batch_size} rows does not divide into {rows} equal shares, one per "
                f"run, and over {self.shards} shards of the mesh. Set BATCH_SIZE to a multiple of "
                f"both {rows} and {self.shards}."
            )
        return np.repeat(np.arange(rows), batch_size // rows).reshape(self.shards, -1)

    def capacities(self, batch_size: int) -> list[int]:
        """Returns the possible numbers of rows of a block, from B / shards down."""
        sizes = [batch_size // self.shards]
        while sizes[-1] % (2 * self.num_microbatches) == 0:
            sizes.append(sizes[-1] // 2)
        return sizes

    def pack(
        self, batch: Mapping[str, np.ndarray], active: Sequence[bool] | np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns this process's rows without those of inactive groups.

        Padding rows have no tokens and name an active run of their block, so nothing reads the
        values of inactive runs. If a block has no active run, they name its first run, whose
        values are read with weight zero and do not affect any other run.

        Args:
            batch: all of this process's rows, not packed.
            active: whether each group [G] is active; the same on all processes.

        Raises:
            ValueError: the run of a row is not the one its position implies.
        """
        rows = len(batch["encoder_task_ids"])
        whole = rows * self.shards // self.local_shards
        owners = self.owners(whole)
        own_blocks = slice(self.first_shard, self.first_shard + self.local_shards)
        task_ids = batch["encoder_task_ids"][:, 0]
        if (task_ids != owners[own_blocks].ravel()).any():
            raise ValueError(
                "The rows of a batch are not in the order of run_names, so the rows of finished "
                "runs cannot be found by their position. Set SAMPLER to sampling.EqualQuotas, with "
                "the runs in the order of run_names."
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
            value[empty] = names[empty, None] if name in _TASK_IDS else 0
        return packed


_TASK_IDS = ("encoder_task_ids", "decoder_task_ids")


def _compacted(
    owners: np.ndarray, is_active: np.ndarray, block: int, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, for each row of a compacted block: its index among the process's rows, whether it
    is padding, and its bank row."""
    kept = np.flatnonzero(is_active)
    missing = capacity - len(kept)
    indices = np.concatenate([kept, np.full(missing, kept[0] if len(kept) else 0)])
    empty = np.arange(capacity) >= len(kept)
    return block * len(owners) + indices, empty, owners[indices]
