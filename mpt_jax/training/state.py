"""Train state, concrete or as shapes, and parameter counts."""

from __future__ import annotations

import functools
import re
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.core.shapes import Params
from mpt_jax.core.tree import flatten, merge, split, unflatten
from mpt_jax.models.model import FROZEN, Model
from mpt_jax.training.optimizers import STEP_COUNTER
from mpt_jax.training.partitioning import PjitPartitioner, put_like, shardings_like


class TrainState(flax.struct.PyTreeNode):
    """The state that a step reads and writes.

    Attributes:
        step: the number of steps taken.
        trainable: the trainable parameters, in float32. Saved in checkpoints.
        opt_state: the optimizer state of the trainable parameters. Saved in checkpoints.
        frozen: all other parameters, the backbone's in the compute dtype. Loaded from their
            sources, never saved.
        ended: int32 [G], the job's step at which a group stopped training, or -1 while it trains.
            Checkpoints save it in their metadata (from `Trainer.run_status`), not with the arrays.
        failed: bool [G], whether a group stopped because a value was not finite. Saved like
            `ended`.
    """

    step: Any  # an array, or its shape or sharding
    trainable: dict[str, Any]
    opt_state: Any
    frozen: dict[str, Any]
    ended: Any
    failed: Any

    @property
    def params(self) -> dict[str, Any]:
        """The whole parameter tree."""
        return merge(self.trainable, self.frozen)


@functools.lru_cache(maxsize=4)  # traces the whole network; a job calls it twice
def param_shapes(model: Model) -> tuple[dict[str, Any], Params]:
    """Returns the whole parameter tree as `ShapeDtypeStruct`s, and its logical axes."""
    variables = jax.eval_shape(model.get_initial_variables, jax.random.PRNGKey(0))
    return flax.core.unfreeze(variables["params"]), variables["params_axes"]


def backbone_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter that the backbone has before `Model.precompute`."""
    tree, pattern = param_shapes(model)[0], model.backbone_pattern
    if model.precomputes:
        tree = jax.eval_shape(lambda key: model.init_backbone(key)[0], jax.random.PRNGKey(0))
    return {name: x.shape for name, x in flatten(tree).items() if re.fullmatch(pattern, name)}


def create_train_state(
    model: Model,
    params: Params,
    partitioner: PjitPartitioner,
    rows_by_run: bool = False,
) -> TrainState:
    """Returns the state at step 0, sharded over the mesh. For `rows_by_run`, see `Trainer`. A model
    without an optimizer, which cannot be trained, has no optimizer state.

    Raises:
        ValueError: the model has an optimizer, but no parameter is trainable.
    """
    trainable, frozen = split(params, model.labels, trainable_labels(model, params))
    if model.optimizer_def is not None and not flatten(trainable):
        raise ValueError(
            "No parameter is trainable: every parameter is labeled 'frozen'. Use a prompt method "
            "with trainable parameters, or add a rule with another label to TRAINABLE."
        )
    shardings = _shardings(model, partitioner, params, param_shapes(model)[1], rows_by_run)
    put = lambda tree: put_like(tree, shardings, partitioner.replicated)  # noqa: E731
    trainable = put(trainable)
    opt_state = {}
    if model.optimizer_def is not None:
        opt_state = put(jax.jit(model.optimizer_def.init)(trainable))
    replicate = lambda x: jax.device_put(x, partitioner.replicated)  # noqa: E731
    return TrainState(
        step=replicate(jnp.zeros((), jnp.int32)),
        trainable=trainable,
        opt_state=opt_state,
        frozen=put(frozen),
        ended=replicate(jnp.full(model.runs.num_groups, -1, jnp.int32)),
        failed=replicate(jnp.zeros(model.runs.num_groups, bool)),
    )


def abstract_train_state(
    model: Model, partitioner: PjitPartitioner, rows_by_run: bool = False
) -> TrainState:
    """Returns the state at step 0 as `ShapeDtypeStruct`s. The mesh devices need not be attached."""
    tree, axes = param_shapes(model)
    dtypes = _dtypes(model, tree)
    shardings = _shardings(model, partitioner, tree, axes, rows_by_run)
    tree = unflatten(
        {name: jax.ShapeDtypeStruct(x.shape, dtypes[name]) for name, x in flatten(tree).items()}
    )
    trainable, frozen = split(tree, model.labels, trainable_labels(model, tree))
    opt_state = jax.eval_shape(model.optimizer_def.init, trainable)
    shape = jax.ShapeDtypeStruct
    groups = (model.runs.num_groups,)
    ended, failed = shape(groups, jnp.int32), shape(groups, jnp.bool_)
    state = TrainState(shape((), jnp.int32), trainable, opt_state, frozen, ended, failed)
    shaped = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(shaped, state, shardings_like(state, shardings, partitioner.replicated))


def _shardings(
    model: Model,
    partitioner: PjitPartitioner,
    params: Params,
    axes: Params,
    rows_by_run: bool,
) -> dict[str, Any]:
    shardings = partitioner.shardings(params, axes)
    return partitioner.by_runs(shardings, model.rows, model.runs) if rows_by_run else shardings


def trainable_labels(model: Model, params: Params) -> set[str]:
    """Returns the labels of all trainable parameters: every label except 'frozen'."""
    return set(flatten(model.label_tree(params)).values()) - {FROZEN}


def num_params(params: Params) -> int:
    """Returns the number of parameters in a tree."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in flatten(params).values())


def num_trainable_params(model: Model, params: Params) -> int:
    """Returns the number of trainable parameters, without frozen ones and step counters."""
    labels = flatten(model.label_tree(params))
    return sum(
        int(np.prod(np.shape(leaf)))
        for name, leaf in flatten(params).items()
        if labels[name] not in (FROZEN, STEP_COUNTER)
    )


def _dtypes(model: Model, params: Params) -> dict[str, Any]:
    """Returns the dtype of each parameter during training, by name: that of the backbone for its
    frozen arrays. Scalars stay float32, since they scale all outputs."""
    labels, dtype = flatten(model.label_tree(params)), model.backbone_config.dtype
    backbone = [
        name
        for name, leaf in flatten(params).items()
        if labels[name] == FROZEN and re.fullmatch(model.backbone_pattern, name) and np.ndim(leaf)
    ]
    return {name: np.dtype(np.float32) for name in labels} | dict.fromkeys(backbone, dtype)
