"""Out-of-memory errors that list what takes the memory and which settings reduce it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mpt_jax.core.batch import num_rows

_PLAN = "\nTo check a configuration in advance, run `mpt-jax plan`; it needs no attached TPUs."


class OutOfMemory(RuntimeError):
    """A training step did not fit in device memory. The message lists what takes the memory, and
    the settings that reduce it."""


@contextlib.contextmanager
def explain_oom(trainer: Any, batch: Mapping[str, Any]) -> Iterator[None]:
    """Context manager that converts an out-of-memory error into one that says what to change.

    Args:
        trainer: the `Trainer` that runs the steps. Its type is `Any`, because trainer.py imports
            this module.
        batch: this process's rows of the largest batch so far.

    Raises:
        OutOfMemory: a step, or its compilation, ran out of device memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(describe(trainer, batch, str(error).partition("\n")[0])) from error


def describe(trainer: Any, batch: Mapping[str, Any], said: str) -> str:
    """Returns the message of OutOfMemory: what takes the memory of a device, and how each relevant
    setting would change it.

    Args:
        trainer: the `Trainer` whose step did not fit.
        batch: this process's rows of the batch.
        said: the first line of JAX's error.
    """
    mesh = trainer.partitioner.mesh
    shards, model_axis = math.prod(mesh.devices.shape[:-1]), mesh.devices.shape[-1]
    rows = num_rows(batch) * jax.process_count() // shards
    parts = trainer.num_microbatches
    row, sizes, remat, exact, other = trainer.model.row_cost(batch)
    at_a_time = max(rows // parts, 1)
    backbone, trainable = _bytes(trainer.state.frozen), _bytes(trainer.state.trainable)
    moments = _bytes(trainer.state.opt_state)
    lines = [
        f"A training step does not fit in device memory ({said}). Each device holds "
        f"{_size(backbone)} of backbone weights, {_size(trainable + moments)} of trainable "
        f"parameters and their optimizer moments, and the activations of {at_a_time} rows at a "
        f"time, {sizes}. The layer inputs alone take {_size(at_a_time * row)}, and all "
        "activations several times that. Try the following, in this order:",
    ]
    # All microbatches have one size, so halving it may take more than twice as many of them.
    more = next((count for count in range(2 * parts, rows + 1) if rows % count == 0), None)
    if more is not None:
        lines.append(
            f"trainer.Trainer.num_microbatches = {more} processes {rows // more} rows at a time "
            f"({_size(rows // more * row)} of layer inputs). Results are the same up to rounding."
        )
    if remat is not None:
        lines.append(
            f"{remat} = 'full' stores little more than the layer inputs, but needs "
            "about a third more compute."
        )
    if exact is not None:
        lines.append(exact)
    wider = f"partitioning.PjitPartitioner.num_partitions = {2 * model_axis}"
    if trainer.partitioner.ici_mesh_shape is not None:
        wider = f"A last size of {2 * model_axis} in partitioning.PjitPartitioner.ici_mesh_shape"
    lines.append(
        f"{wider} splits the backbone over twice as many devices ({_size(backbone / 2)} each), if "
        "each process has that many."
    )
    lines += _smaller_steps(rows, rows * shards, trainer.model.runs.num_groups, other)
    return "\n  * ".join(lines) + _PLAN


def _smaller_steps(rows: int, all_rows: int, groups: int, remedy: str | None) -> list[str]:
    """Lists ways to reduce the rows per device and step.

    Args:
        rows: the number of rows per device and step.
        all_rows: the number of rows per step on all devices together.
        groups: the number of groups; a batch needs at least one row for each group.
        remedy: the model's own way (`RowCost.other_remedy`).
    """
    lines = []
    if rows >= 2 and all_rows >= 2 * groups:
        lines.append(
            f"Halving BATCH_SIZE leaves {rows // 2} rows per device and step, but changes the "
            "results."
        )
    if remedy is not None:
        lines.append(remedy)
    if groups > 1 and rows >= 2:
        lines.append(
            f"{groups} groups of runs share this step. If two jobs train half of the groups each, "
            f"a step has {rows // 2} rows per device, and the resulting prompts are the same."
        )
    return lines


def larger_batch(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the batch with more positions. Length buckets give batches different lengths."""
    return first if _positions(first) > _positions(second) else second


def _positions(batch: Mapping[str, Any]) -> int:
    return sum(np.size(value) for value in batch.values())


def _bytes(tree: Any) -> int:
    """Returns the bytes that a tree takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _size(count: int | float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
