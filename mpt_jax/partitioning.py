"""Mesh, logical-axis rules and shardings. The names are T5X's; the engine is `jax.jit`.

Every parameter and activation carries logical axis names ('embed', 'mlp', 'heads', 'batch', ...).
One ordered table of rules maps them to the two axes of the mesh, `data` and `model`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.linen import partitioning as nn_partitioning
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpt_jax.shapes import Params
from mpt_jax.tree import flatten, unflatten

AxisRules = Sequence[tuple[str, str | None]]

# Axes of prompts and their factors: a few hundred numbers a task, so every device holds them all.
PROMPT_RULES: AxisRules = (("groups", None), ("tasks", None), ("prompt", None), ("rank", None))


def standard_logical_axis_rules(
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
    additional_rules: AxisRules | None = None,
) -> AxisRules:
    """T5X's standard rules, plus those of the prompts.

    Args:
        activation_partitioning_dims: 2 also splits activations' width over `model`.
        parameter_partitioning_dims: 2 also splits parameters' width over `data`.
        additional_rules: rules for further axes, tried first.

    Raises:
        ValueError: dims other than 1 or 2.
    """
    dims = (activation_partitioning_dims, parameter_partitioning_dims)
    if any(dim not in (1, 2) for dim in dims):
        raise ValueError(f"Partitioning dims must be 1 or 2, got {dims}.")
    rules: list[tuple[str, str | None]] = [("batch", "data")]
    rules += [(axis, "model") for axis in ("vocab", "mlp", "heads", "joined_kv")]
    if activation_partitioning_dims == 2:
        rules.append(("embed", "model"))
    if parameter_partitioning_dims == 2:
        rules.append(("embed", "data"))
    if dims == (1, 1):
        rules.append(("embed", None))
    whole = ("kv", "relpos_buckets", "abspos_buckets", "length", "layers", "stack")
    rules += [(axis, None) for axis in (*whole, "mlp_activations")]
    return (*(additional_rules or ()), *PROMPT_RULES, *rules)


@dataclasses.dataclass
class PjitPartitioner:
    """A (data, model) mesh over all devices, and shardings from logical axes.

    Attributes:
        num_partitions: devices on the model axis; it must divide the device count.
        logical_axis_rules: default `standard_logical_axis_rules()`.
        model_parallel_submesh, params_on_devices, backend, ici_mesh_shape, dcn_mesh_shape: T5X's;
            only their defaults are accepted.

    Raises:
        ValueError: num_partitions does not divide the number of devices, or a setting would have
            no effect; num_partitions would spread one model over several processes.
    """

    num_partitions: int = 1
    logical_axis_rules: AxisRules = dataclasses.field(default_factory=standard_logical_axis_rules)
    model_parallel_submesh: Any = None
    params_on_devices: bool = True
    backend: str | None = None
    ici_mesh_shape: Any = None
    dcn_mesh_shape: Any = None

    def __post_init__(self):
        for field in dataclasses.fields(self)[2:]:
            if getattr(self, field.name) != field.default:
                raise ValueError(
                    f"PjitPartitioner.{field.name}={getattr(self, field.name)!r} would have no "
                    "effect: the mesh is (devices / num_partitions, num_partitions). Leave it at "
                    f"{field.default!r}, or run under T5X."
                )
        devices = jax.devices()
        if self.num_partitions < 1 or len(devices) % self.num_partitions:
            raise ValueError(
                f"num_partitions={self.num_partitions} does not divide the {len(devices)} devices "
                "of this run; the mesh is (devices / num_partitions, num_partitions)."
            )
        local = jax.local_device_count()
        if jax.process_count() > 1 and local % self.num_partitions:
            raise ValueError(
                f"num_partitions={self.num_partitions} would spread one model over several "
                f"processes of {local} devices each, and each process reads data of its own: give "
                f"a divisor of {local}, or run under T5X."
            )
        # Process by process, because each holds its own rows of the batch.
        devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        shape = (len(devices) // self.num_partitions, self.num_partitions)
        self.mesh = Mesh(np.asarray(devices).reshape(shape), ("data", "model"))

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Makes the mesh and the rules known to constraints inside traced functions."""
        rules = nn_partitioning.axis_rules(tuple(self.logical_axis_rules))
        with jax.set_mesh(self.mesh), rules:
            yield

    @property
    def replicated(self) -> NamedSharding:
        """On every device whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """Rows split over the data axis."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    def shardings(self, params: Params, axes: Params) -> dict[str, Any]:
        """The sharding of every parameter.

        Args:
            params: the parameters (or their shapes).
            axes: their logical axes, `<name>_axes` beside each name as flax keeps them.

        Raises:
            ValueError: a parameter without axes, or an axis without a rule.
        """
        named = {
            name.removesuffix("_axes"): tuple(leaf.names)
            for name, leaf in flatten(axes, is_leaf=_is_axes).items()
        }
        found = {}
        for name in flatten(params):
            if name not in named:
                raise ValueError(f"Parameter {name} has no logical axes.")
            known = {axis for axis, _ in self.logical_axis_rules}
            unknown = [axis for axis in named[name] if axis not in known]
            if unknown:
                raise ValueError(
                    f"No rule for the logical axes {unknown} of {name}; add them to "
                    "standard_logical_axis_rules.additional_rules."
                )
            spec = nn_partitioning.logical_to_mesh_axes(named[name], tuple(self.logical_axis_rules))
            found[name] = NamedSharding(self.mesh, PartitionSpec(*(spec or ())))
        return unflatten(found)

    def shard_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a global batch, as global arrays."""
        return {
            name: jax.make_array_from_process_local_data(self.batch, np.asarray(value))
            for name, value in batch.items()
        }


def to_host(tree: Params) -> dict[str, Any]:
    """Every leaf whole, as a NumPy array, from wherever it lies on the mesh."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, nn_partitioning.AxisMetadata)


def put_like(state: Any, shardings: Mapping[str, Any], replicated: NamedSharding) -> Any:
    """Places any tree that has parameters inside (an optimizer state, say): a leaf whose path
    ends in a parameter's name lies as that parameter does, everything else on every device."""
    by_name = flatten(shardings, is_leaf=lambda x: isinstance(x, NamedSharding))

    def place(name: str, leaf: Any) -> jax.Array:
        parts = name.split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        found = next((by_name[tail] for tail in tails if tail in by_name), replicated)
        return jax.device_put(leaf, found)

    leaves = [place(name, leaf) for name, leaf in flatten(state).items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)
