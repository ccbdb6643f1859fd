"""optax transformations that update every row of a parameter independently of other rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Bool, Float, Int, Params
from mpt_jax.core.tree import flatten, path_name
from mpt_jax.training.schedules import PerGroup, per_group

# Path name -> what a parameter's rows count, 'groups' or 'tasks' (`prompts.base.row_axes`).
# Parameters without an entry (the backbone's, for example) have no rows.
Rows = Mapping[str, str]


def row_groups(name: str, rows: Rows, runs: Runs) -> tuple[int, ...] | None:
    """Returns the group of each row of a parameter, or None if it has no rows.

    Args:
        name: the parameter's path, for example `prompt/shared`.
        rows: what the rows of each parameter count (see `Rows`).
        runs: the runs of the job.

    Raises:
        ValueError: the parameter has no rows, but the job has several groups.
    """
    if rows.get(name) == "groups":
        return tuple(range(runs.num_groups))
    if rows.get(name) == "tasks":
        return runs.group_of_row
    if runs.num_groups > 1:
        raise ValueError(
            f"The parameter {name!r} is shared by all runs, so {runs.num_groups} independent runs "
            "cannot train it in one job. Train each run in a separate job."
        )
    return None


class RowState(NamedTuple):
    """The stacked inner states of all rows, and the number of steps each row has taken."""

    inner: Any
    steps: Int[Array, " n"]


def by_row(
    inner: optax.GradientTransformation,
    schedule: Callable[..., Array],
    groups: tuple[int, ...] | None,
    hold: bool,
    decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns a transformation that applies `inner` and a learning rate to each row separately.

    Args:
        inner: the transformation of one row, applied before the learning rate.
        schedule: (step [n], group [n]) -> learning rate [n].
        groups: the group of each of the n rows, or None for parameters without rows.
        hold: whether a row and its optimizer state stay unchanged if all its gradients are exactly
            zero.
        decay: the part of a row's values that is subtracted in every step, whatever the learning
            rate.
    """
    if groups is None:
        # Like a single row that is in every batch: nothing to stack or to hold.
        chain = optax.chain(inner, optax.scale_by_learning_rate(schedule))
        return optax.chain(chain, optax.add_decayed_weights(-decay)) if decay else chain
    rows = np.asarray(groups)

    def init(params: Params) -> RowState:
        return RowState(jax.vmap(inner.init)(params), jnp.zeros(len(rows), jnp.int32))

    def update(grads: Params, state: RowState, params: Params) -> tuple[Params, RowState]:
        updates, moved = jax.vmap(inner.update)(grads, state.inner, params)
        rates = -schedule(state.steps, jnp.asarray(rows))
        updates = jax.tree.map(lambda u: _rows(rates, u) * u, updates)
        if decay:
            updates = jax.tree.map(lambda u, p: u - decay * p, updates, params)
        new = RowState(moved, state.steps + 1)
        if hold:
            present = jnp.zeros(len(rows), bool)
            for grad in jax.tree.leaves(grads):
                present = present | jnp.any(grad != 0, axis=tuple(range(1, grad.ndim)))
            new = jax.tree.map(lambda a, b: jnp.where(_rows(present, a), a, b), new, state)
            updates = jax.tree.map(lambda u: jnp.where(_rows(present, u), u, 0.0), updates)
        return updates, new

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def gradient_norms(grads: Params, rows: Rows, runs: Runs) -> Float[Array, " G"]:
    """Returns the norm [G] of each group's gradient over all its parameters."""
    squares = jnp.zeros(runs.num_groups, jnp.float32)
    for name, grad in flatten(grads).items():
        groups = row_groups(name, rows, runs)
        square = jnp.square(grad.astype(jnp.float32))
        if groups is None:
            squares = squares.at[0].add(square.sum())
        else:
            squares = squares.at[np.asarray(groups)].add(square.sum(tuple(range(1, grad.ndim))))
    return jnp.sqrt(squares)


def clip_by_group_norm(
    max_norm: PerGroup | None, rows: Rows, runs: Runs
) -> optax.GradientTransformation:
    """Returns a transformation that clips each group's gradient to a maximum norm, if not None."""
    if max_norm is None:
        return optax.identity()

    def update(grads: Params, state: Any, params: Any = None) -> tuple[Params, Any]:
        norms = gradient_norms(grads, rows, runs)
        limits = jnp.broadcast_to(per_group(max_norm), norms.shape)
        scales = jnp.where(norms > limits, limits / jnp.maximum(norms, 1e-30), 1.0)

        def scale(path: tuple, grad: Array) -> Array:
            groups = row_groups(path_name(path), rows, runs)
            factor = scales[0] if groups is None else _rows(scales[np.asarray(groups)], grad)
            return (grad * factor).astype(grad.dtype)

        return jax.tree_util.tree_map_with_path(scale, grads), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)  # pyright: ignore


def _pick_rows(
    stepped: Bool[Array, " G"], groups: tuple[int, ...] | None, new: Array, old: Array
) -> Array:
    """Returns the rows of `new` for groups that took the step, and of `old` for all others."""
    rows = stepped[0] if groups is None else _rows(stepped[np.asarray(groups)], new)
    return jnp.where(rows, new, old)


def _rows(values: Array, like: Array) -> Array:
    """Reshapes values [n] so that they broadcast over the rows of an array [n, ...]."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))
