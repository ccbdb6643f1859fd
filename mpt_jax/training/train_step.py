"""Pure functions of one step: gradients, update and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.batch import is_packed, map_task_ids, row_task_ids
from mpt_jax.core.shapes import Array, Batch, Bool, Key, Params
from mpt_jax.core.tree import flatten, merge
from mpt_jax.models import losses, metrics
from mpt_jax.models.model import Model
from mpt_jax.training.row_transforms import gradient_norms, row_groups
from mpt_jax.training.state import TrainState


def gradients(
    model: Model,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    dropout_rng: Key | None,
    num_microbatches: int = 1,
    coefficients: Mapping[str, Array] | None = None,
) -> tuple[Params, metrics.StepMetrics]:
    """Returns the gradient of the objective over a whole batch, and the step's metrics.

    Args:
        model: the model, with its prompt method and objective.
        trainable: the parameters to differentiate.
        frozen: all other parameters.
        batch: the whole batch; `num_microbatches` must divide its number of rows.
        dropout_rng: the random key of dropout and of randomly drawn prompts; None disables both.
        num_microbatches: the number of parts that the batch is split into, to save memory.
        coefficients: the coefficient of every term; None for the objective's.
    """
    normalizers = model.loss_normalizers(batch)
    batch = model.number_examples(batch)

    def objective(trainable: Params, part: Batch, rng: Key | None) -> tuple[Array, Any]:
        params = merge(trainable, frozen)
        # All microbatches of a step use the same randomly drawn prompts.
        sums, step_metrics = model.loss_sums(params, part, rng, prompt_rng=dropout_rng)
        total, _ = losses.total_loss(model.objective, sums, normalizers, coefficients)
        return total, (sums, step_metrics)

    differentiate = jax.grad(objective, has_aux=True)
    if num_microbatches == 1:
        grads, (sums, step_metrics) = differentiate(trainable, batch, dropout_rng)
        return grads, {**step_metrics, **metrics.term_metrics(sums, normalizers)}

    def body(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
        rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, part[1])
        return jax.tree.map(jnp.add, total, differentiate(trainable, part[0], rng)), None

    parts = jax.tree.map(lambda x: _interleave(x, num_microbatches), dict(batch))
    first = jax.tree.map(lambda x: x[0], parts)
    start = jax.eval_shape(differentiate, trainable, first, dropout_rng)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)
    inputs = (parts, jnp.arange(num_microbatches))
    (grads, (sums, step_metrics)), _ = jax.lax.scan(body, start, inputs)
    return grads, {**step_metrics, **metrics.term_metrics(sums, normalizers)}


def term_gradient_norms(
    model: Model,
    num_microbatches: int,
    state: TrainState,
    batch: Batch,
    rng: Key,
) -> dict[str, Array]:
    """Returns the norm of the gradient of every term of the objective, times its coefficient, over
    all trainable parameters. The arguments are those of `train_step`."""
    own, batch = model.objective.coefficients(), _fill_padding_ids(batch)

    def norm(coefficients: Array) -> Array:
        named = dict(zip(own, coefficients, strict=True))
        grads, _ = gradients(
            model, state.trainable, state.frozen, batch, _step_key(model, state, rng),
            num_microbatches, named,
        )  # fmt: skip
        return jnp.sqrt(jnp.square(gradient_norms(grads, model.rows, model.runs)).sum())

    norms = jax.lax.map(norm, jnp.diag(jnp.asarray(list(own.values()), jnp.float32)))
    return dict(zip(own, norms, strict=True))


def _step_key(model: Model, state: TrainState, rng: Key) -> Key | None:
    """Returns the random key of a step, or None if nothing is drawn."""
    return jax.random.fold_in(rng, state.step) if model.is_random else None


def train_step(
    model: Model,
    num_microbatches: int,
    state: TrainState,
    batch: Batch,
    rng: Key,
) -> tuple[TrainState, metrics.StepMetrics]:
    """Takes one training step. Returns the next state and the step's metrics.

    Gradients are clipped and parameters are updated group by group. The parameters of groups that
    have ended stay bit-identical. The metrics cover only the groups that took the step. If every
    group has failed, the state is returned unchanged.

    Args:
        model: the model to train.
        num_microbatches: see `gradients`.
        state: the state before the step.
        batch: a global batch.
        rng: the job's random key. Dropout and randomly drawn prompts depend only on this key and
            the step.
    """
    batch = _fill_padding_ids(batch)
    key = _step_key(model, state, rng)
    grads, step_metrics = gradients(
        model, state.trainable, state.frozen, batch, key, num_microbatches
    )
    norms = gradient_norms(grads, model.rows, model.runs)
    step_metrics["gradient_norm"] = metrics.Metric(norms, jnp.ones_like(norms))
    updates, opt_state = model.optimizer_def.update(grads, state.opt_state, state.trainable)
    trainable = jax.tree.map(jnp.add, state.trainable, updates)
    active = state.ended < 0
    stepped = active & _finite(model, norms, step_metrics, trainable)
    trainable, opt_state = model.optimizer_def.select(
        stepped, (trainable, opt_state), (state.trainable, state.opt_state)
    )
    failing = active & ~stepped
    failed = state.failed | failing
    over = stepped & model.optimizer_def.is_over(opt_state, trainable)
    ended = jnp.where(failing, state.step, jnp.where(over, state.step + 1, state.ended))
    taken = ~failed.all()
    new = state.replace(
        step=jnp.where(taken, state.step + 1, state.step),
        trainable=trainable,
        opt_state=opt_state,
        ended=jnp.where(taken, ended, state.ended),
        failed=jnp.where(taken, failed, state.failed),
    )
    return new, metrics.mask_groups(step_metrics, stepped, model.runs)


def eval_step(
    model: Model, params: Params, batch: Batch, failed: Bool[Array, " G"]
) -> metrics.StepMetrics:
    """Returns the metrics of a batch: the objective's terms and each run's loss, without dropout.

    Groups that have `failed` [G] are excluded.
    """
    batch = _fill_padding_ids(batch)
    sums, step_metrics = model.loss_sums(params, batch)
    step_metrics |= metrics.term_metrics(sums, model.loss_normalizers(batch))
    return metrics.mask_groups(step_metrics, ~failed, model.runs)


def _interleave(x: Array, parts: int) -> Array:
    """Splits [B, ...] into [parts, B / parts, ...]. Part i has rows i, i + parts, ..., so every
    part is spread evenly over all devices, like the batch.

    Raises:
        ValueError: the number of rows is not a multiple of `parts`.
    """
    check_microbatches(x.shape[0], parts)
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def check_microbatches(rows: int, parts: int) -> None:
    """Checks that a batch can be split into microbatches.

    Raises:
        ValueError: `parts` is less than 1, or the number of rows is not a multiple of it.
    """
    if parts < 1 or rows % parts:
        raise ValueError(
            f"A batch of {rows} rows does not divide into {parts} microbatches. Set "
            f"trainer.Trainer.num_microbatches to a divisor of {rows}"
            + (f", or BATCH_SIZE to a multiple of {parts}." if parts > 0 else ".")
        )


def _fill_padding_ids(batch: Batch) -> Batch:
    """Replaces task id 0 at the padding of an unpacked batch with the task id of the same row.

    Padding has weight zero, but zero times NaN is NaN. With task id 0 at its padding, a run that
    fails would make the run of bank row 0 fail as well.
    """
    if is_packed(batch):
        return batch
    row_ids = row_task_ids(batch)
    fill = lambda ids: jnp.broadcast_to(row_ids.reshape(-1, *[1] * (ids.ndim - 1)), ids.shape)  # noqa: E731
    return map_task_ids(batch, fill)


def _finite(
    model: Model,
    norms: Array,
    step_metrics: metrics.StepMetrics,
    trainable: Params,
) -> Bool[Array, " G"]:
    """Returns whether each group's losses, gradient and new parameters are all finite."""
    finite = jnp.isfinite(norms)
    for name, metric in step_metrics.items():
        if name.startswith("term/"):
            finite &= jnp.isfinite(metric.sum)
    for name, leaf in flatten(trainable).items():
        groups = row_groups(name, model.rows, model.runs)
        if groups is None:
            finite &= jnp.isfinite(leaf).all()
        else:
            bad = (~jnp.isfinite(leaf)).any(tuple(range(1, leaf.ndim))).astype(jnp.int32)
            finite &= jax.ops.segment_max(bad, np.asarray(groups), model.runs.num_groups) == 0
    return finite
