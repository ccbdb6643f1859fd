"""Updates of single layers of a frozen backbone, by which adapters such as LoRA act.

The Flax collection `updates` has an update at the path of every layer that an adapter changes: a
pytree that is called with the layer's input, weights and output, and returns another output. It is
a collection, so the modules between a model and its layers do not pass anything on, and a scan over
layers slices it as it slices parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax import linen as nn

from mpt_jax.core.tree import unflatten

COLLECTION, NAME = "updates", "update"


@runtime_checkable
class LayerUpdate(Protocol):
    """An update of a layer; a pytree."""

    def __call__(self, x: jax.Array, kernel: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the new output of a layer.

        Args:
            x: the input [B, positions, in].
            kernel: the frozen weights [in, out].
            y: the output [B, positions, out] without the update.
        """
        ...


def updated(layer: nn.Module, x: jax.Array, kernel: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the output of a layer after its update, if there is one; see `LayerUpdate`."""
    if not layer.has_variable(COLLECTION, NAME):
        return y
    return layer.get_variable(COLLECTION, NAME)(x, kernel, y)


def is_updated(module: nn.Module) -> bool:
    """Whether a module or a layer inside it has an update."""
    return bool(module.variables.get(COLLECTION))


def by_layer(
    updates: Mapping[str, LayerUpdate], depths: Mapping[str, int], scanned: bool
) -> dict[str, Any]:
    """Returns the collection, given the updates of all layers of a stack at once.

    Args:
        updates: updates by path without the number of the layer (`encoder/attention/query`). The
            first axis of every array is the layer.
        depths: the number of layers of each stack.
        scanned: whether the network scans over layers.
    """
    found: dict[str, Any] = {}
    for path, update in updates.items():
        stack, rest = path.split("/", 1)
        if scanned:
            found[f"{stack}/{stack}/{rest}/{NAME}"] = update
            continue
        for i in range(depths[stack]):
            of_layer = jax.tree.map(lambda x: x[i], update)  # noqa: B023 -- called at once
            found[f"{stack}/layers_{i}/{rest}/{NAME}"] = of_layer
    return unflatten(found)
