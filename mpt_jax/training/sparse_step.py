"""Training step on only the bank rows of a batch, so its cost does not grow with the bank.

With `absent_tasks='hold'`, a step does not change the bank rows of tasks that are not in the batch.
It can therefore run on a smaller bank: the bank rows of the batch are gathered from the parameters
and the optimizer state, a model with only these rows takes the step, and its results are scattered
back. The results are the same as those of a step on the whole bank. Values, gradients and moments
of all other bank rows are neither read nor written.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.core.batch import map_task_ids, used_task_ids
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Int, Params
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.models import metrics
from mpt_jax.models.model import Model
from mpt_jax.training.state import TrainState

Step = Callable[[Model, TrainState, Batch], tuple[TrainState, metrics.StepMetrics]]
TEACHER = "teacher/table"


def most_rows(model: Model, batch: Batch) -> int | None:
    """Returns the largest number of bank rows that a batch can use.

    Returns None if the step must use the whole bank. This is so if absent tasks are not held, runs
    are independent, prompts depend on all of the bank, or the batch may use more than half of it.
    """
    if model.optimizer_def.absent_tasks != "hold" or model.runs.num_groups > 1:
        return None
    count = model.max_examples(batch)
    return count if count is not None and 2 * count <= model.runs.num_rows else None


def step_of_batch(
    step: Step, model: Model, state: TrainState, batch: Batch
) -> tuple[TrainState, metrics.StepMetrics]:
    """Takes a step on only the bank rows of a batch if possible, else on the whole bank.

    Args:
        step: (model, state, batch) -> (state, metrics); it must not change bank rows that are not
            in the batch.
        model: the model to train.
        state: the state before the step.
        batch: a global batch.

    Returns:
        The next state and the metrics, both for the whole bank.
    """
    if (count := most_rows(model, batch)) is None:
        return step(model, state, batch)
    rows = _rows_in(batch, model.runs.num_rows, count)
    small = _with_rows(model, count)
    old = _gather(small, state, rows)
    new, row_metrics = step(small, old, _renumber(batch, rows))
    return _scatter(state, new, rows), _expand_metrics(row_metrics, rows, model.runs.num_rows)


def _rows_in(batch: Batch, num_rows: int, count: int) -> Int[Array, " n"]:
    """Returns the bank rows that a batch uses, in ascending order. They are padded to `count` with
    `num_rows`, which is not a valid bank row."""
    return jnp.unique(used_task_ids(batch, num_rows), size=count, fill_value=num_rows)


def _renumber(batch: Batch, rows: Int[Array, " n"]) -> Batch:
    """Replaces the task ids of a batch (bank rows) with their indices in `rows`. Padding, which has
    task id 0, gets an arbitrary index."""
    index_of = lambda ids: jnp.clip(jnp.searchsorted(rows, ids), 0, len(rows) - 1)  # noqa: E731
    return map_task_ids(batch, lambda ids: index_of(ids).astype(jnp.int32))


def _with_rows(model: Model, count: int) -> Model:
    """Returns the same model with a bank of `count` rows."""
    small = copy.copy(model)
    small.runs = Runs([f"row {row}" for row in range(count)])
    small.optimizer_def = model.optimizer_def.bind(model.labels, small.runs, model.rows)
    return small


def _gather(small: Model, state: TrainState, rows: Array) -> TrainState:
    """Returns the state of a smaller bank that has only the bank rows `rows`."""
    gather = lambda x: jnp.take(x, rows, axis=0, mode="clip")  # noqa: E731
    with_rows = {TEACHER, *(name for name, axis in small.rows.items() if axis == "tasks")}

    def take(tree: Params) -> dict[str, Any]:
        leaves = flatten(tree).items()
        return unflatten({name: gather(x) if name in with_rows else x for name, x in leaves})

    trainable, frozen = take(state.trainable), take(state.frozen)
    shapes = jax.eval_shape(small.optimizer_def.init, trainable)
    opt_state = jax.tree.map(
        lambda leaf, like: leaf if leaf.shape == like.shape else gather(leaf),
        state.opt_state,
        shapes,
    )
    return dataclasses.replace(state, trainable=trainable, opt_state=opt_state, frozen=frozen)


def _scatter(state: TrainState, new: TrainState, rows: Array) -> TrainState:
    """Returns the state of the whole bank after a step on the bank rows `rows`."""

    def scatter(whole: Array, part: Array) -> Array:
        if whole.shape == part.shape:
            return part
        # In place if the state is donated.
        return whole.at[rows].set(part, mode="drop", unique_indices=True, indices_are_sorted=True)

    return dataclasses.replace(
        new,
        trainable=jax.tree.map(scatter, state.trainable, new.trainable),
        opt_state=jax.tree.map(scatter, state.opt_state, new.opt_state),
        frozen=state.frozen,
    )


def _expand_metrics(
    row_metrics: metrics.StepMetrics, rows: Array, num_rows: int
) -> metrics.StepMetrics:
    """Returns metrics of every bank row, with weight zero for those not in the batch."""
    whole = lambda x: jnp.zeros(num_rows, x.dtype).at[rows].add(x, mode="drop")  # noqa: E731
    return {
        name: metric
        if name.startswith((metrics.OF_BATCH, *metrics.BY_GROUP))
        else metrics.Metric(whole(metric.sum), whole(metric.weight))
        for name, metric in row_metrics.items()
    }
