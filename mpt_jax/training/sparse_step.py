"""A step on only the bank rows of a batch, so that its cost does not grow with the bank.

With `absent_tasks='hold'` a step does not change the rows of tasks that are not in the batch.
So it can run on a smaller bank, of the rows that are in the batch: they are gathered from
parameters and optimizer state, a model with that many rows takes the step, and the results are
scattered back. The results are the same. The step neither reads nor writes the values, gradients
and moments of all other rows.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.core.batch import encoder_mask
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Batch, Int, Params
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.models import metrics
from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
from mpt_jax.training.state import TrainState

Step = Callable[[PromptedEncoderDecoder, TrainState, Batch], tuple[TrainState, metrics.StepMetrics]]
TEACHER = "teacher/table"


def most_rows(model: PromptedEncoderDecoder, batch: Batch) -> int | None:
    """Returns the largest number of bank rows a batch can name, or None if the step must use the
    whole bank: absent rows are not held, runs are independent, prompts depend on run names, or
    the batch may name more than half of the bank."""
    optimizer, runs, prompt = model.optimizer_def, model.runs, model.prompt
    if optimizer.absent_tasks != "hold" or runs.num_groups > 1 or prompt.depends_on_run_names:
        return None
    count, positions = batch["encoder_input_tokens"].shape
    if "encoder_segment_ids" in batch:  # an example has at least its prompt's positions
        count *= max(positions // max(prompt.prompt_length, 1), 1)
    return count if 2 * count <= runs.num_rows else None


def step_of_batch(
    step: Step, model: PromptedEncoderDecoder, state: TrainState, batch: Batch
) -> tuple[TrainState, metrics.StepMetrics]:
    """Takes a step on the bank rows of a batch if that leaves rows out, else on the whole bank.

    Args:
        step: (model, state, batch) -> (state, metrics); it must not change rows that are not in
            the batch.
        model: the model to train.
        state: the state before the step.
        batch: a global batch.

    Returns:
        What `step` returns, for the whole bank.
    """
    if (count := most_rows(model, batch)) is None:
        return step(model, state, batch)
    rows = _rows_in(batch, model.runs.num_rows, count)
    small = _with_rows(model, count)
    old = _gather(small, state, rows)
    new, row_metrics = step(small, old, _renumber(batch, rows))
    return _scatter(state, new, rows), _expand_metrics(row_metrics, rows, model.runs.num_rows)


def _rows_in(batch: Batch, num_rows: int, count: int) -> Int[Array, " n"]:
    """Returns the bank rows that a batch names, ascending, padded to `count` with `num_rows`, which
    is no row."""
    named = jnp.where(encoder_mask(batch), batch["encoder_task_ids"], num_rows)
    return jnp.unique(named, size=count, fill_value=num_rows)


def _renumber(batch: Batch, rows: Int[Array, " n"]) -> Batch:
    """Replaces bank rows in a batch by their indices in `rows`. Padding, whose id is 0, gets an
    arbitrary index."""
    index_of = lambda ids: jnp.clip(jnp.searchsorted(rows, ids), 0, len(rows) - 1)  # noqa: E731
    names = ("encoder_task_ids", "decoder_task_ids")
    return {**batch, **{name: index_of(batch[name]).astype(jnp.int32) for name in names}}


def _with_rows(model: PromptedEncoderDecoder, count: int) -> PromptedEncoderDecoder:
    """Returns the same model with a bank of `count` rows."""
    small = copy.copy(model)
    small.runs = Runs([f"row {row}" for row in range(count)])
    small.optimizer_def = model.optimizer_def.bind(model.labels, small.runs, model.rows)
    return small


def _gather(small: PromptedEncoderDecoder, state: TrainState, rows: Array) -> TrainState:
    """Returns the state of a bank that has only `rows`."""
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
    """Returns the state of the whole bank after a step on `rows`."""

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
    """Returns metrics of every bank row, with weight zero for rows not in the batch."""
    whole = lambda x: jnp.zeros(num_rows, x.dtype).at[rows].add(x, mode="drop")  # noqa: E731
    return {
        name: metric
        if name.startswith((metrics.OF_BATCH, *metrics.BY_GROUP))
        else metrics.Metric(whole(metric.sum), whole(metric.weight))
        for name, metric in row_metrics.items()
    }
