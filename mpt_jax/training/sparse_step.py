"""A step on the bank rows of a batch alone, so that its cost does not grow with the bank.

With `absent_tasks='hold'` a step leaves the rows of tasks that are not in the batch as they are.
So it may as well be taken on a bank of the rows that are: they are gathered from parameters and
optimizer state, the step of a model of just so many rows is taken, and they are put back. The
numbers are the same; what is saved is reading and writing the values, gradients and moments of
all the others.
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
    """How many bank rows a batch can name at most; None where the step takes the whole bank:
    absent rows are not held, runs are independent, prompts depend on runs' names, or the batch may
    name half of the bank."""
    optimizer, runs, prompt = model.optimizer_def, model.runs, model.prompt
    if optimizer.absent_tasks != "hold" or runs.num_groups > 1 or prompt.depends_on_run_names:
        return None
    count, positions = batch["encoder_input_tokens"].shape
    if "encoder_segment_ids" in batch:  # an example takes its prompt's positions at least
        count *= max(positions // max(prompt.prompt_length, 1), 1)
    return count if 2 * count <= runs.num_rows else None


def step_of_batch(
    step: Step, model: PromptedEncoderDecoder, state: TrainState, batch: Batch
) -> tuple[TrainState, metrics.StepMetrics]:
    """Takes a step on the rows of a batch where that leaves rows out, else on the whole bank.

    Args:
        step: (model, state, batch) -> (state, metrics); it must leave rows that are not in the
            batch as they are.
        model: what is trained.
        state: before the step.
        batch: a global batch.

    Returns:
        What `step` returns, of the whole bank.
    """
    if (count := most_rows(model, batch)) is None:
        return step(model, state, batch)
    rows = _rows_in(batch, model.runs.num_rows, count)
    small = _with_rows(model, count)
    old = _take(small, state, rows)
    new, found = step(small, old, _renamed(batch, rows))
    return _put(state, new, rows), _spread(found, rows, model.runs.num_rows)


def _rows_in(batch: Batch, num_rows: int, count: int) -> Int[Array, " n"]:
    """The bank rows that a batch names, rising; `num_rows`, which is none, where there are fewer
    than `count`."""
    named = jnp.where(encoder_mask(batch), batch["encoder_task_ids"], num_rows)
    return jnp.unique(named, size=count, fill_value=num_rows)


def _renamed(batch: Batch, rows: Int[Array, " n"]) -> Batch:
    """The batch with places among `rows` for bank rows. Padding, which says 0, gets some place."""
    place = lambda ids: jnp.clip(jnp.searchsorted(rows, ids), 0, len(rows) - 1)  # noqa: E731
    names = ("encoder_task_ids", "decoder_task_ids")
    return {**batch, **{name: place(batch[name]).astype(jnp.int32) for name in names}}


def _with_rows(model: PromptedEncoderDecoder, count: int) -> PromptedEncoderDecoder:
    """The same model with a bank of `count` rows."""
    small = copy.copy(model)
    small.runs = Runs([f"row {row}" for row in range(count)])
    small.optimizer_def = model.optimizer_def.bind(model.labels, small.runs, model.rows)
    return small


def _take(small: PromptedEncoderDecoder, state: TrainState, rows: Array) -> TrainState:
    """The state of a bank of `rows` alone."""
    gather = lambda x: jnp.take(x, rows, axis=0, mode="clip")  # noqa: E731
    of_tasks = {TEACHER, *(name for name, axis in small.rows.items() if axis == "tasks")}

    def take(tree: Params) -> dict[str, Any]:
        leaves = flatten(tree).items()
        return unflatten({name: gather(x) if name in of_tasks else x for name, x in leaves})

    trainable, frozen = take(state.trainable), take(state.frozen)
    shapes = jax.eval_shape(small.optimizer_def.init, trainable)
    opt_state = jax.tree.map(
        lambda leaf, like: leaf if leaf.shape == like.shape else gather(leaf),
        state.opt_state,
        shapes,
    )
    return dataclasses.replace(state, trainable=trainable, opt_state=opt_state, frozen=frozen)


def _put(state: TrainState, new: TrainState, rows: Array) -> TrainState:
    """The state of the whole bank after a step of `rows`."""

    def scatter(whole: Array, part: Array) -> Array:
        if whole.shape == part.shape:
            return part
        # In place, where the state is donated.
        return whole.at[rows].set(part, mode="drop", unique_indices=True, indices_are_sorted=True)

    return dataclasses.replace(
        new,
        trainable=jax.tree.map(scatter, state.trainable, new.trainable),
        opt_state=jax.tree.map(scatter, state.opt_state, new.opt_state),
        frozen=state.frozen,
    )


def _spread(found: metrics.StepMetrics, rows: Array, num_rows: int) -> metrics.StepMetrics:
    """Metrics of each row of the bank, without weight where a row was not in the batch."""
    whole = lambda x: jnp.zeros(num_rows, x.dtype).at[rows].add(x, mode="drop")  # noqa: E731
    return {
        name: metric
        if name.startswith((metrics.OF_BATCH, *metrics.BY_GROUP))
        else metrics.Metric(whole(metric.sum), whole(metric.weight))
        for name, metric in found.items()
    }
