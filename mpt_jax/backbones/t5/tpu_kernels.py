"""Shared parts of the TPU kernels: supported chips, memory limits, and calls on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import partitioning

LANES = 128  # a block's last axis is a multiple of this, or the whole axis
VMEM_LIMIT_BYTES = 64 << 20
# v5e, v5p and v6e have at least twice the limit. v4 has 16 MiB. Others have not been tried.
WITH_LARGE_VMEM = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")


def on_tpu(kinds: tuple[str, ...] = WITH_LARGE_VMEM) -> bool:
    """Whether the traced program is for TPUs of these kinds, attached or not.

    By default, these are the TPUs that the kernels support. Without a mesh from `jax.set_mesh`,
    which T5X does not call, this is False if there are several devices, since the kernels could not
    be split over them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        single_tpu = jax.default_backend() == "tpu" and jax.device_count() == 1
        return single_tpu and jax.devices()[0].device_kind in kinds
    return device.device_kind in kinds


def over_mesh(
    function: Callable[..., Any],
    arrays: tuple[Any, ...],
    axes: tuple[Any, ...],
    out: tuple[str | None, ...],
) -> jax.Array:
    """Runs a function on each device, on the rows and heads that are local to the device.

    Args:
        function: the function, called with the local part of each array.
        arrays: the arguments of the function.
        axes: the logical axes of each argument, in a tree with the structure of `arrays`.
        out: the logical axes of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    is_axes = lambda x: isinstance(x, tuple) and not isinstance(x[0], tuple)  # noqa: E731
    specs = jax.tree.map(partitioning.logical_to_mesh_axes, axes, is_leaf=is_axes)
    run = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs,
        out_specs=partitioning.logical_to_mesh_axes(out),
        check_vma=False,  # varying axes are not tracked through a kernel
    )
    return run(*arrays)


def shards_of(axis: str) -> int:
    """Returns the number of devices that a logical axis, such as `heads`, is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    spec = partitioning.logical_to_mesh_axes((axis,))
    names = () if not spec or spec[0] is None else spec[0]
    return math.prod(mesh.shape[n] for n in ((names,) if isinstance(names, str) else names))


def product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Returns the product of two matrices, summed over an axis of each, in float32."""
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
