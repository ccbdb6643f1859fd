"""Train state and initializer for the real T5X, behind T5X's protocols.

T5X trains `params` as one tree. Here that tree includes the frozen backbone, but only trainable
parameters have gradients and moments and are in `state_dict()`, so a T5X checkpoint is as small as
the prompts. Frozen parameters are read from their origins at every start, resumed or not. Nothing
here subclasses or imports T5X: T5X calls the methods of these objects by name.

    train_script.train.train_state_initializer_cls = @initializer.TrainStateInitializer
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util
from flax.core import unfreeze
from flax.linen import partitioning as nn_partitioning
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import NamedSharding, PartitionSpec

from mpt_jax.artifacts import artifacts, model_card, provenance
from mpt_jax.artifacts.backbone_digest import backbone_config
from mpt_jax.config import trainer_choice
from mpt_jax.core.shapes import Key, Params
from mpt_jax.core.tree import by_suffix, flatten, match_exactly, merge, split, unflatten
from mpt_jax.data import task_lookup
from mpt_jax.models.model import Model
from mpt_jax.training import initialization
from mpt_jax.training.state import num_trainable_params, param_shapes, trainable_labels

NONE_IS_LEAF: dict[str, Any] = {"is_leaf": lambda x: x is None}


class Host:
    """Constants that all states of a job share; each state has them as a static field.

    Args:
        model: the model that T5X trains.
        origins: origins of the initial parameters.
        optimizer: the optimizer; None for evaluation and inference.
        partitioner: T5X's partitioner.
    """

    def __init__(
        self,
        model: Model,
        origins: initialization.Origins,
        optimizer: Any,
        partitioner: Any,
    ):
        self.model = model
        self.origins = origins
        self.optimizer = optimizer
        self.partitioner = partitioner
        self.shapes, self.logical_axes = param_shapes(model)
        self.labels = trainable_labels(model, self.shapes)
        self._loaded: initialization.InitialParams | None = None

    def split(self, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits a whole parameter tree into (trainable, frozen)."""
        return split(params, self.model.labels, self.labels)

    def load(self, key: Key) -> initialization.InitialParams:
        """Returns all parameters, read from their origins once per process."""
        if self._loaded is None:
            self._loaded = initialization.initialize_params(self.model, self.origins, key)
        return self._loaded

    @functools.cached_property
    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes by parameter name. Prompts and features of class texts are replicated on
        every device, so their axes are None and T5X's rules do not need them."""
        is_axes = lambda x: isinstance(x, nn_partitioning.AxisMetadata)  # noqa: E731
        named = flatten(unfreeze(dict(self.logical_axes)), is_leaf=is_axes)
        axes = {}
        for name, leaf in flatten(self.shapes).items():
            names = tuple(named[f"{name}_axes"].names)
            if name.startswith(("prompt/", "teacher/", "class_features/")):
                names = (None,) * len(leaf.shape)
            axes[name] = names
        return axes

    def place(self, name: str, value: Any) -> jax.Array:
        """Places a parameter on the devices of T5X's mesh, sharded by its logical axes."""
        spec = logical_to_mesh_axes(self.axes[name], self.partitioner.logical_axis_rules)
        sharding = NamedSharding(self.partitioner.mesh, PartitionSpec(*(spec or ())))
        return jax.device_put(value, sharding)

    def opt_axis_names(self, opt_state: Any) -> Any:
        """Returns the logical axes of the optimizer state: a moment has its parameter's axes."""
        axes = [PartitionSpec(*by_suffix(self.axes, name, ())) for name in flatten(opt_state)]
        return jax.tree.unflatten(jax.tree.structure(opt_state), axes)


class HostState(flax.struct.PyTreeNode):
    """Implementation of T5X's TrainState protocol with all parameters, of which only the trainable
    ones are saved.

    Attributes:
        step: number of steps taken.
        params: all parameters, trainable and frozen.
        param_states: the optimizer's state for trainable parameters; None without an optimizer.
        host: the constants that all states of the job share.
        whole: whether `state_dict()` and `restore_state()` include frozen parameters. T5X's
            partitioner uses these two methods to map axes, and needs the axes of all parameters.
    """

    step: Any
    params: Any
    param_states: Any = None
    host: Any = flax.struct.field(pytree_node=False, default=None)
    whole: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def flax_mutables(self) -> dict[str, Any]:
        """An empty dictionary, because the model has no mutable collections."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the contents of a checkpoint: trainable parameters, optimizer state and step."""
        target = self.params if self.whole else self.host.split(self.params)[0]
        state = {"step": self.step}
        if self.param_states is not None:
            leaves = flatten(self.param_states, **NONE_IS_LEAF)
            state["param_states"] = unflatten(leaves)
        return {"target": target, "state": state}

    def restore_state(self, state_dict: Mapping[str, Any]) -> HostState:
        """Returns the state that `state_dict` describes, with frozen parameters from their origin.

        Raises:
            ValueError: parameters or optimizer leaves are missing, extra or of another shape.
        """
        target = traverse_util.flatten_dict(dict(state_dict["target"]), sep="/")
        trainable, frozen = self.host.split(self.params)
        expected = self.params if self.whole else trainable
        _match(expected, target, "The checkpoint")
        params = unflatten(target)
        if not self.whole:
            params = merge(params, self._frozen(frozen))
        param_states = self.param_states
        if param_states is not None:
            saved = traverse_util.flatten_dict(dict(state_dict["state"]["param_states"]), sep="/")
            names = list(flatten(param_states, **NONE_IS_LEAF))
            _match(param_states, saved, "The checkpoint's optimizer state")
            leaves = [saved[name] for name in names]
            treedef = jax.tree.structure(param_states, **NONE_IS_LEAF)
            param_states = jax.tree.unflatten(treedef, leaves)
        return self.replace(
            step=state_dict["state"]["step"], params=params, param_states=param_states
        )

    def _frozen(self, frozen: Params) -> dict[str, Any]:
        """Returns the frozen parameters: loaded if they are shapes, otherwise unchanged."""
        leaves = flatten(frozen)
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values()):
            return unflatten(leaves)
        # The key affects only prompts, whose trainable parameters come from the checkpoint.
        loaded = flatten(self.host.load(jax.random.PRNGKey(0)).params)
        return unflatten({name: self.host.place(name, loaded[name]) for name in leaves})

    def apply_gradient(
        self, grads: Params, learning_rate: Any, flax_mutables: Any = None
    ) -> HostState:
        """Takes one optimizer step. The optimizer has its own learning rates, by label and group;
        T5X only logs `learning_rate`.

        If a result is not finite, parameters and moments keep their values, as with this library's
        trainer. The step still increases, because T5X counts steps itself and later checkpoints
        would otherwise be one step behind the data. T5X logs the NaN as `loss`.
        """
        trainable, frozen = self.host.split(self.params)
        updates, param_states = self.host.optimizer.update(
            self.host.split(grads)[0], self.param_states, trainable
        )
        old = (trainable, self.param_states)
        new = (jax.tree.map(jnp.add, trainable, updates), param_states)
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new)]).all()
        trainable, param_states = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        return self.replace(
            step=self.step + 1, params=merge(trainable, frozen), param_states=param_states
        )

    def as_logical_axes(self) -> HostState:
        """Returns the same state with logical axis names instead of arrays."""
        states = self.param_states
        return self.replace(
            step=PartitionSpec(),
            params=unflatten({k: PartitionSpec(*v) for k, v in self.host.axes.items()}),
            param_states=None if states is None else self.host.opt_axis_names(states),
        )

    def replace_params(self, params: Params) -> HostState:
        """Returns the state with other parameters."""
        return self.replace(params=params)

    def replace_step(self, step: Any) -> HostState:
        """Returns the state at another step."""
        return self.replace(step=step)


class TrainStateInitializer:
    """Builder of the train state for T5X. Takes the arguments of T5X's class of the same name, and
    `origins`.

    Args:
        optimizer_def: the model's optimizer; None for evaluation and inference.
        init_fn: the model's bound method `get_initial_variables`, which gives access to the model.
        input_shapes: {feature: shape} of a global batch.
        partitioner: T5X's partitioner.
        input_types: ignored, since parameters do not depend on the batch.
        origins: origins of the initial parameters.

    Raises:
        ValueError: MPT_JAX_TRAINER requests this library's trainer.
    """

    def __init__(
        self,
        optimizer_def: Any,
        init_fn: Callable[..., Any],
        input_shapes: Mapping[str, Sequence[int]],
        partitioner: Any,
        input_types: Mapping[str, Any] | None = None,
        *,
        origins: initialization.Origins,
    ):
        model: Model = init_fn.__self__  # pyright: ignore
        if trainer_choice.requested_trainer() == "own":
            raise ValueError(
                f"{trainer_choice.VARIABLE}=own, but T5X runs this job, because Python found it "
                "before the fallback. Run `python -m mpt_jax.train`, which always uses this "
                "library's trainer."
            )
        logging.info("Trainer: T5X, with mpt_jax's model and train state.")
        self._host = Host(model, origins, optimizer_def, partitioner)
        if optimizer_def is not None:
            model.expected_rows = next(iter(input_shapes.values()))[0]
        self._partitioner = partitioner
        self.global_train_state_shape = jax.eval_shape(
            functools.partial(_state, self._host), self._host.shapes
        )
        whole = self.global_train_state_shape.replace(whole=True)
        self.train_state_axes = partitioner.get_mesh_axes(whole).replace(whole=False)
        _HOSTS[:] = [self._host]

    def from_scratch(self, init_rng: Key) -> HostState:
        """Returns the state at step 0, with every parameter from its origin."""
        params = unflatten(
            {
                name: self._host.place(name, value)
                for name, value in flatten(self._host.load(init_rng).params).items()
            }
        )
        make = self._partitioner.partition(
            functools.partial(_state, self._host),
            in_axis_resources=(self.train_state_axes.params,),
            out_axis_resources=self.train_state_axes,
            donate_argnums=(0,),
        )
        return make(params)


def _state(host: Host, params: Params) -> HostState:
    """Returns the state at step 0 with the given parameters."""
    states = None if host.optimizer is None else host.optimizer.init(host.split(params)[0])
    return HostState(jnp.zeros((), jnp.int32), unflatten(flatten(params)), states, host)


def _match(expected: Any, saved: Mapping[str, Any], what: str) -> None:
    """Checks that two trees have the same names, and the same shapes if both have arrays. (Leaves
    may also be axis names.)"""
    wanted = flatten(expected, **NONE_IS_LEAF)
    shape = lambda leaf, other: getattr(leaf, "shape", ()) if hasattr(other, "shape") else ()  # noqa: E731
    match_exactly(
        {name: shape(leaf, saved.get(name)) for name, leaf in wanted.items()},
        {name: shape(leaf, wanted.get(name)) for name, leaf in saved.items()},
        what,
    )


# --- Prompt artifacts ----------------------------------------------------------------------------

# The `Host` of the job in this process. T5X's initializer and its save hooks do not share objects.
_HOSTS: list[Host] = []


@dataclasses.dataclass(frozen=True)
class ArtifactHook:
    """Hook that writes MODEL_DIR/artifact at every save of T5X, without changing the saved state.

    If the prompts have values that are not finite, it keeps the artifact of the previous save.
    """

    model_dir: str

    def __call__(self, state_dict: Params, parameter_infos: Any) -> tuple[Params, Any]:
        """Writes the artifact, and returns the arguments unchanged. T5X calls this as a
        transformation of the state at every save."""
        prompt = state_dict["target"].get("prompt")
        if prompt is not None and jax.process_index() == 0:
            self._write(prompt, int(state_dict["state"]["step"]))
        return state_dict, parameter_infos

    def _write(self, prompt: Params, step: int) -> None:
        path = os.path.join(self.model_dir, "artifact")
        host = _HOSTS[-1]
        loaded = host.load(jax.random.PRNGKey(0))
        # The state does not include the frozen parameters of a prompt.
        values = flatten(loaded.params["prompt"]) | flatten(prompt)
        values = {name: np.asarray(leaf) for name, leaf in values.items()}
        broken = [name for name, value in values.items() if not np.isfinite(value).all()]
        if broken:
            logging.error(
                "The prompts of step %d are not finite (%s), so %s was not updated. Lower the "
                "learning rate.",
                step,
                ", ".join(broken),
                path,
            )
            return
        artifacts.save_artifact(
            path,
            host.model.prompt,
            unflatten(values),
            host.model.runs,
            digests=loaded.digests,
            backbone=host.origins.name,
            backbone_config=backbone_config(host.model.backbone_config),
            step=step,
            started_from=loaded.started_from,
            images=host.model.input_settings,
            include_folded=True,
            facts=_card_facts(host),
        )


def _card_facts(host: Host) -> model_card.Facts:
    """Returns the facts that the model card states beyond the artifact's configuration. They
    include no scores, because T5X evaluates after a save."""
    tasks = [task_lookup.find_task(n) for n in host.model.runs.run_names if task_lookup.is_task(n)]
    return model_card.Facts(
        data={task.name: model_card.data_of(task) for task in tasks},
        num_trainable=num_trainable_params(host.model, host.shapes),
        git_revision=provenance.git_revision(),
        packages=provenance.package_versions(),
    )


def save_hooks(model_dir: str) -> list[ArtifactHook]:
    """Returns the hooks for `SaveCheckpointConfig.state_transformation_fns`."""
    return [ArtifactHook(model_dir)]
