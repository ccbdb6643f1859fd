"""Row operations: reads the rows of parameter tables for the examples of a batch."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Float, Int


@runtime_checkable
class Grouped(Protocol):
    """What composing a prompt reads of `Runs`; a bank whose rows the compiler does not know has
    only this."""

    @property
    def group_of_row(self) -> Any:
        """[K]."""
        ...

    @property
    def num_groups(self) -> int:
        """G."""
        ...


def first_row_of_groups(runs: Runs) -> list[int]:
    """The row each group is initialized by: its first."""
    return [runs.group_of_row.index(group) for group in range(runs.num_groups)]


# The mesh's axes that both examples and the rows of runs are split over, while a step is traced
# whose examples lie on the shard of their run.
_SPLIT_OVER: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("axes", default=())


@contextlib.contextmanager
def rows_split_over(axes: tuple[str, ...]) -> Iterator[None]:
    """Inside, `take` reads rows of tables that are split over these axes of the mesh, for examples
    that are split over them too and lie on the shard of their row."""
    token = _SPLIT_OVER.set(axes)
    try:
        yield
    finally:
        _SPLIT_OVER.reset(token)


def gather_rows(table: Float[Array, "rows ..."], ids: Int[Array, "..."]) -> Array:
    """`table[ids]`: the rows of some examples. Inside `rows_split_over` every shard looks into its
    own rows, so nothing of the table, nor of its gradient, travels."""
    axes = _SPLIT_OVER.get()
    if not axes:
        return table[ids]

    def on_shard(rows: Array, ids: Array) -> Array:
        return rows[ids - jax.lax.axis_index(axes) * rows.shape[0]]

    split = jax.sharding.PartitionSpec(axes)
    return jax.shard_map(on_shard, in_specs=(split, split), out_specs=split)(table, ids)


def gather_group_params(
    table: Float[Array, "G ..."], runs: Grouped, task_ids: Int[Array, "..."]
) -> Array:
    """What the group of each example has; of one group alone without the examples' axes, so that
    nothing is repeated."""
    if runs.num_groups == 1:
        return table[0]
    return gather_rows(table, jnp.asarray(runs.group_of_row)[task_ids])


def expand_leading_dims(values: Array, axes: int) -> Array:
    """Values with axes of size one in front, until they have as many as given."""
    return values.reshape((1,) * (axes - values.ndim) + values.shape)
