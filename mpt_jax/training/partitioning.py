"""Mesh, logical-axis rules and shardings, with T5X's names, for `jax.jit`.

Every parameter and activation has logical axis names ('embed', 'mlp', 'heads', 'batch', ...).
One ordered table of rules maps them to the axes of the mesh, `data` and `model`. With several
slices there may be a third axis in front, `replica`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.linen import partitioning as nn_partitioning
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Params
from mpt_jax.core.tree import by_suffix, flatten, unflatten

AxisRules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# Axes of prompts and their factors: a few hundred numbers per task, so every device holds all of
# them (except with `PjitPartitioner.by_runs`).
PROMPT_AXES = ("groups", "tasks", "sources", "prompt", "rank")
PROMPT_RULES: AxisRules = tuple((axis, None) for axis in PROMPT_AXES)


def standard_logical_axis_rules(
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
    additional_rules: AxisRules | None = None,
) -> AxisRules:
    """Returns additional rules, the prompts' rules and T5X's standard rules, in this order.

    Args:
        activation_partitioning_dims: 1, or 2 to also split the model width of activations over
            `model`.
        parameter_partitioning_dims: 1, or 2 to also split the model width of parameters over
            `data`.
        additional_rules: further rules, which take precedence over all others.

    Raises:
        ValueError: a number of dimensions is neither 1 nor 2.
    """
    dims = (activation_partitioning_dims, parameter_partitioning_dims)
    if any(dim not in (1, 2) for dim in dims):
        raise ValueError(
            "activation_partitioning_dims and parameter_partitioning_dims must each be 1 or 2, got "
            f"{dims[0]} and {dims[1]}."
        )
    rules: list[tuple[str, str | tuple[str, ...] | None]] = [("batch", "data")]
    rules += [(axis, "model") for axis in ("vocab", "mlp", "heads", "joined_kv")]
    if activation_partitioning_dims == 2:
        rules.append(("embed", "model"))
    if parameter_partitioning_dims == 2:
        rules.append(("embed", "data"))
    if dims == (1, 1):
        rules.append(("embed", None))
    whole = ("kv", "relpos_buckets", "abspos_buckets", "length", "layers", "stack")
    rules += [(axis, None) for axis in (*whole, "mlp_activations", "patch", "joint", "classes")]
    return (*(additional_rules or ()), *PROMPT_RULES, *rules)


@dataclasses.dataclass
class PjitPartitioner:
    """A mesh of devices, and shardings derived from logical axes.

    The mesh is (data, model) = (devices / num_partitions, num_partitions). If `ici_mesh_shape` and
    `dcn_mesh_shape` are given, the mesh is (replica, data, model), and the size of each axis is the
    product of its sizes in the two shapes, as in T5X. The batch is split over replica and data. On
    TPUs a slice is a TPU slice; on other backends each process counts as one slice.

    The model axis never spans processes. Rows of the batch are ordered by process, because each
    process reads its own rows.

    Attributes:
        num_partitions: the number of devices on the model axis; must divide the number of devices
            of each process.
        logical_axis_rules: the rules that map logical axes to mesh axes; defaults to
            `standard_logical_axis_rules()`. If there is a replica axis, a rule that maps `batch`
            to `data` is changed to map it to replica and data.
        ici_mesh_shape: the sizes of (replica, data, model) inside a slice; requires
            `dcn_mesh_shape`.
        dcn_mesh_shape: the sizes of (replica, data, model) across slices; requires
            `ici_mesh_shape`.
        model_parallel_submesh, params_on_devices, backend: settings of T5X; only their defaults are
            accepted.
        devices: the devices of the mesh; defaults to all devices of this job. To compile ahead of
            time, pass the devices of a topology.

    Raises:
        ValueError: the sizes do not fit the devices, or a setting would have no effect.
    """

    num_partitions: int = 1
    logical_axis_rules: AxisRules = dataclasses.field(default_factory=standard_logical_axis_rules)
    model_parallel_submesh: Any = None
    params_on_devices: bool = True
    backend: str | None = None
    ici_mesh_shape: Sequence[int] | None = None
    dcn_mesh_shape: Sequence[int] | None = None
    devices: Sequence[Any] | None = dataclasses.field(default=None, kw_only=True, repr=False)

    def __post_init__(self):
        unsupported = {"model_parallel_submesh": None, "params_on_devices": True, "backend": None}
        for name, default in unsupported.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"PjitPartitioner.{name}={getattr(self, name)!r} would have no effect, because "
                    "only num_partitions, or ici_mesh_shape and dcn_mesh_shape, determine the "
                    f"mesh. Leave {name} at its default, {default!r}, or run the job under T5X "
                    "(docs/t5x.md)."
                )
        devices = jax.devices() if self.devices is None else self.devices
        if self.ici_mesh_shape is None and self.dcn_mesh_shape is None:
            self.mesh = Mesh(_by_process(devices, self.num_partitions), ("data", "model"))
            return
        shape = _hybrid_shape(self.ici_mesh_shape, self.dcn_mesh_shape, devices)
        if self.num_partitions not in (1, shape[-1]):
            raise ValueError(
                f"num_partitions={self.num_partitions} and ici_mesh_shape={self.ici_mesh_shape} "
                f"give the model axis two sizes, {self.num_partitions} and {shape[-1]}. Leave "
                "num_partitions at its default, 1."
            )
        rows = _by_process(devices, shape[-1], "ici_mesh_shape[-1]")
        self.mesh = Mesh(rows.reshape(shape), ("replica", "data", "model"))
        self.logical_axis_rules = tuple(
            (name, ("replica", "data")) if (name, axis) == ("batch", "data") else (name, axis)
            for name, axis in self.logical_axis_rules
        )

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Makes the mesh and the rules available to sharding constraints in traced functions."""
        rules = nn_partitioning.axis_rules(tuple(self.logical_axis_rules))
        with jax.set_mesh(self.mesh), rules:
            yield

    @property
    def replicated(self) -> NamedSharding:
        """The sharding with a full copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding with rows split over every mesh axis except the model axis."""
        return NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names[:-1]))

    @property
    def num_shards(self) -> int:
        """The number of shards that the rows of a batch are split into."""
        return math.prod(self.mesh.devices.shape[:-1])

    def shardings(self, params: Params, axes: Params) -> dict[str, Any]:
        """Returns the sharding of every parameter.

        Args:
            params: the parameters (or their shapes).
            axes: their logical axes, a tree with a leaf `<name>_axes` for each parameter, as
                returned by flax.

        Raises:
            ValueError: a parameter has no axes, or an axis has no rule.
        """
        named = {
            name.removesuffix("_axes"): tuple(leaf.names)
            for name, leaf in flatten(axes, is_leaf=_is_axes).items()
        }
        shardings = {}
        for name in flatten(params):
            if name not in named:
                raise ValueError(
                    f"The parameter {name} has no logical axes. Declare them where the parameter "
                    "is defined (for a prompt method, in its `axes`)."
                )
            known = {axis for axis, _ in self.logical_axis_rules}
            unknown = [axis for axis in named[name] if axis not in known]
            if unknown:
                raise ValueError(
                    f"No rule maps the logical axes {', '.join(unknown)} of {name} to the mesh. "
                    "Add a rule for each axis to standard_logical_axis_rules.additional_rules."
                )
            spec = nn_partitioning.logical_to_mesh_axes(named[name], tuple(self.logical_axis_rules))
            shardings[name] = NamedSharding(self.mesh, PartitionSpec(*(spec or ())))
        return unflatten(shardings)

    def by_runs(self, params: Mapping[str, Any], rows: Mapping[str, str], runs: Runs) -> Any:
        """Returns shardings that split the rows of prompt parameters over the shards of a batch.

        In a job of independent runs, each run has an equal, contiguous share of a batch, so its
        examples are on the same shard as its parameters. The shardings are returned unchanged if
        there is only one run or one shard, if the number of runs is not a multiple of the number
        of shards, or if runs share groups.

        Args:
            params: a sharding for every parameter.
            rows: what the rows of each parameter count, for parameters that have rows
                (`prompts.base.row_axes`).
            runs: the runs of the job.
        """
        axes = self.mesh.axis_names[:-1]
        if not self.splits_runs(runs):
            return params
        shardings = flatten(params, is_leaf=lambda x: isinstance(x, NamedSharding))
        for name in rows.keys() & shardings.keys():
            rest = [axis if axis == "model" else None for axis in shardings[name].spec[1:]]
            shardings[name] = NamedSharding(self.mesh, PartitionSpec(axes, *rest))
        return unflatten(shardings)

    def splits_runs(self, runs: Runs) -> bool:
        """Whether `by_runs` splits the parameters of these runs over shards."""
        shards = self.num_shards
        independent = runs.group_of_row == tuple(range(runs.num_rows))
        return shards > 1 and runs.num_rows > 1 and independent and runs.num_rows % shards == 0

    def shard_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this process's rows of a global batch on the mesh, as global arrays."""
        return {
            name: jax.make_array_from_process_local_data(self.batch_sharding, np.asarray(value))
            for name, value in batch.items()
        }


def _by_process(
    devices: Sequence[Any], num_partitions: int, setting: str = "num_partitions"
) -> np.ndarray:
    """Arranges devices as [data, num_partitions], ordered by process.

    The devices along the second axis are neighbors in one process.

    Args:
        devices: the devices of the mesh.
        num_partitions: the number of devices on the model axis.
        setting: the setting of that number, for errors.

    Raises:
        ValueError: num_partitions does not divide the number of devices of the job or of a process,
            or processes have different numbers of devices.
    """
    if num_partitions < 1 or len(devices) % num_partitions:
        raise ValueError(
            f"{setting}={num_partitions} does not divide the {len(devices)} devices of this job. "
            f"Set {setting} to a divisor of {len(devices)}."
        )
    counts = collections.Counter(device.process_index for device in devices)
    local = len(devices) // len(counts)
    if set(counts.values()) != {local}:
        raise ValueError(
            "The processes have different numbers of devices: "
            f"{', '.join(f'{count} in process {number}' for number, count in counts.items())}. "
            "Give every process the same number of devices."
        )
    if local % num_partitions:
        raise ValueError(
            f"{setting}={num_partitions} would spread one model over several processes of {local} "
            f"devices each, but each process reads its own data. Set {setting} to a divisor of "
            f"{local}, or run the job under T5X (docs/t5x.md)."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (local // num_partitions, num_partitions),
        (len(counts), 1),
        sorted(devices, key=lambda device: (device.process_index, device.id)),
        process_is_granule=True,
    )


def _hybrid_shape(
    ici: Sequence[int] | None, dcn: Sequence[int] | None, devices: Sequence[Any]
) -> tuple[int, int, int]:
    """Returns the mesh shape (replica, data, model) of a job with several slices.

    Raises:
        ValueError: a shape is missing or invalid; the shapes do not fit the slices and their
            devices; one model would span several slices; or a process would not have contiguous
            rows of the batch.
    """
    shapes = f"ici_mesh_shape={ici} with dcn_mesh_shape={dcn}"
    if ici is None or dcn is None or len(ici) != 3 or len(dcn) != 3 or min(*ici, *dcn) < 1:
        raise ValueError(
            f"{shapes} does not describe a mesh: both must be given, as three sizes of at least 1 "
            "for the axes (replica, data, model). Set ici_mesh_shape to the sizes inside a slice, "
            "and dcn_mesh_shape to the sizes across slices."
        )
    slices = collections.Counter(_slice_of(device) for device in devices)
    if math.prod(dcn) != len(slices) or {math.prod(ici)} != set(slices.values()):
        raise ValueError(
            f"{shapes} needs {math.prod(dcn)} slices of {math.prod(ici)} devices, but this job "
            f"has {len(slices)} slices of {' or '.join(map(str, sorted(set(slices.values()))))} "
            "devices. Change the shapes: the product of dcn_mesh_shape must be the number of "
            "slices, and that of ici_mesh_shape the number of devices in a slice."
        )
    if dcn[-1] != 1:
        raise ValueError(
            f"{shapes} would spread one model over {dcn[-1]} slices, and the network between them "
            "is slow. Set the last size of dcn_mesh_shape to 1, and put the slices on the replica "
            "or the data axis."
        )
    if dcn[1] > 1 and ici[0] > 1:
        raise ValueError(
            f"{shapes} would alternate the rows of the batch between slices, but each process "
            "reads contiguous rows. Put the slices on the replica axis: "
            f"dcn_mesh_shape=({math.prod(dcn)}, 1, 1)."
        )
    ordered = [_slice_of(device) for device in sorted(devices, key=lambda d: d.process_index)]
    if ordered != sorted(ordered):
        order = ", ".join(str(key) for key, _ in itertools.groupby(ordered))
        raise ValueError(
            "The process numbers do not follow the order of the slices: in order of process "
            f"number, the devices are in slices {order}. Number the processes slice by slice, so "
            "that the processes of a slice have consecutive numbers."
        )
    return (ici[0] * dcn[0], ici[1] * dcn[1], ici[2])


def _slice_of(device: Any) -> int:
    """Returns a TPU's slice index (0 if it reports none), or another device's process index."""
    if device.platform == "tpu":
        return getattr(device, "slice_index", None) or 0
    return device.process_index


def to_host(tree: Params) -> dict[str, Any]:
    """Returns the tree with every leaf gathered from the mesh into a NumPy array."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, nn_partitioning.AxisMetadata)


def put_like(state: Any, shardings: Mapping[str, Any], replicated: NamedSharding) -> Any:
    """Places a tree that contains parameters (an optimizer state, for example) on the mesh. A leaf
    whose path ends in a parameter's name is sharded like it, unless it has fewer axes (an unused
    statistic of Adafactor); all others are replicated."""
    return jax.tree.map(jax.device_put, state, shardings_like(state, shardings, replicated))


def shardings_like(state: Any, shardings: Mapping[str, Any], replicated: NamedSharding) -> Any:
    """Returns the sharding that `put_like` gives each leaf of a tree."""
    by_name = flatten(shardings, is_leaf=lambda x: isinstance(x, NamedSharding))

    def sharding(name: str, leaf: Any) -> Any:
        found = by_suffix(by_name, name, replicated)
        return found if np.ndim(leaf) >= len(found.spec) else replicated

    leaves = [sharding(name, leaf) for name, leaf in flatten(state).items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)
