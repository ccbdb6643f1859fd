"""Lookups of parameter rows for the examples of a batch."""

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
    """The attributes of `Runs` that are needed to compose prompts.

    A bank whose runs are unknown at compile time has only these attributes.
    """

    @property
    def group_of_row(self) -> Any:
        """Group number of each bank row, [K]."""
        ...

    @property
    def num_groups(self) -> int:
        """Number of groups, G."""
        ...


def first_row_of_groups(runs: Runs) -> list[int]:
    """Returns the first row of each group, which determines the group's initial values."""
    return [runs.group_of_row.index(group) for group in range(runs.num_groups)]


# Mesh axes that split both the examples and the rows of runs. Set while a step is traced in which
# every example is on the shard of its run.
_SPLIT_OVER: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("axes", default=())


@contextlib.contextmanager
def rows_split_over(axes: tuple[str, ...]) -> Iterator[None]:
    """Context manager in which `gather_rows` reads tables that are sharded over these mesh axes.

    Examples must be sharded over the same axes, each on the shard that holds its table row.
    """
    token = _SPLIT_OVER.set(axes)
    try:
        yield
    finally:
        _SPLIT_OVER.reset(token)


def gather_rows(table: Float[Array, "rows ..."], ids: Int[Array, "..."]) -> Array:
    """Returns `table[ids]`, the table row of each example.

    Inside `rows_split_over` every shard reads only its own rows, so neither the table nor its
    gradient is communicated.
    """
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
    """Returns the parameters of each example's group.

    With a single group the result has no example axes, because all examples share it.
    """
    if runs.num_groups == 1:
        return table[0]
    return gather_rows(table, jnp.asarray(runs.group_of_row)[task_ids])


def numbers_within_rows(task_ids: Int[Array, "..."]) -> Int[Array, "..."]:
    """Returns, for each example, the number of examples of the same bank row before it."""
    ids = task_ids.ravel()
    order = jnp.argsort(ids, stable=True)
    starts = jnp.searchsorted(ids[order], ids[order])
    numbers = jnp.zeros_like(ids).at[order].set(jnp.arange(ids.size, dtype=ids.dtype) - starts)
    return numbers.reshape(task_ids.shape)


def expand_leading_dims(values: Array, axes: int) -> Array:
    """Prepends axes of size one until `values` has `axes` axes."""
    return values.reshape((1,) * (axes - values.ndim) + values.shape)
