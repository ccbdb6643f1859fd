"""Which rows of a batch are sent to the devices: those of runs that still train.

In a job of independent runs each of K runs has an equal, contiguous share of every batch of B rows
(`sampling.EqualQuotas`), and the batch lies in equal blocks, one on each shard of the mesh's data
axis. Rows of runs that have ended are left out; what is left moves to the front of its block, and
all blocks are filled up to one capacity, a halving of their size. So a step costs what the runs
that train cost, to a factor of two, and is compiled again once for each halving.

Rows never change their block: where prompts are sharded by runs, every example stays on the shard
of its prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mpt_jax.core.runs import Runs


@dataclasses.dataclass(frozen=True)
class RowCompactor:
    """The blocks of a batch that lie on this process's devices.

    Attributes:
        runs: the K rows of the bank, in the order of their shares.
        shards: blocks of a batch over all processes.
        first_shard: the first of this process's blocks.
        local_shards: how many this process has, one after the other.
        num_microbatches: must divide every capacity.
    """

    runs: Runs
    shards: int = 1
    first_shard: int = 0
    local_shards: int = 1
    num_microbatches: int = 1

    def owners(self, batch_size: int) -> np.ndarray:
        """The bank row of every row of a batch, [shards, B / shards].

        Raises:
            ValueError: B does not divide by the runs, or by the blocks.
        """
        rows = self.runs.num_rows
        if batch_size % rows or batch_size % self.shards:
            raise ValueError(
                f"A batch of {batch_size} rows does not divide into {rows} equal shares and over "
                f"{self.shards} shards."
            )
        return np.repeat(np.arange(rows), batch_size // rows).reshape(self.shards, -1)

    def capacities(self, batch_size: int) -> list[int]:
        """The rows that a block may have, from B / shards down."""
        found = [batch_size // self.shards]
        while found[-1] % (2 * self.num_microbatches) == 0:
            found.append(found[-1] // 2)
        return found

    def pack(
        self, batch: Mapping[str, np.ndarray], active: Sequence[bool] | np.ndarray
    ) -> dict[str, np.ndarray]:
        """This process's rows without those of groups that are not active.

        What fills a block up has no tokens, and names a run of the block that trains: whatever the
        values of the others are, nothing reads them. Where none of a block trains, it names the
        block's first, whose values are read without weight and reach no other run.

        Args:
            batch: all of this process's rows, unpacked.
            active: which groups [G] train; the same on all processes.

        Raises:
            ValueError: a row is of another run than its place says.
        """
        rows = len(batch["encoder_task_ids"])
        whole = rows * self.shards // self.local_shards
        owners = self.owners(whole)
        mine = slice(self.first_shard, self.first_shard + self.local_shards)
        found = batch["encoder_task_ids"][:, 0]
        if (found != owners[mine].ravel()).any():
            raise ValueError(
                "Rows of a batch are not in the order of run_names, so those of runs that have "
                "ended cannot be told by their place; give sampling.EqualQuotas the runs in the "
                "order of run_names."
            )
        trains = np.asarray(active)[np.asarray(self.runs.group_of_row)][owners]
        needed = trains.sum(axis=1).max()
        capacity = min(size for size in self.capacities(whole) if size >= needed)
        if capacity == owners.shape[1]:
            return dict(batch)
        blocks = [
            _filled(owners[shard], trains[shard], (shard - self.first_shard), capacity)
            for shard in range(mine.start, mine.stop)
        ]
        chosen, empty, names = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        packed = {name: value[chosen] for name, value in batch.items()}
        for name, value in packed.items():
            value[empty] = names[empty, None] if name in _TASK_IDS else 0
        return packed


_TASK_IDS = ("encoder_task_ids", "decoder_task_ids")


def _filled(
    owners: np.ndarray, trains: np.ndarray, block: int, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of a block's places: which of the process's rows, whether none, and whose."""
    kept = np.flatnonzero(trains)
    missing = capacity - len(kept)
    places = np.concatenate([kept, np.full(missing, kept[0] if len(kept) else 0)])
    empty = np.arange(capacity) >= len(kept)
    return block * len(owners) + places, empty, owners[places]
