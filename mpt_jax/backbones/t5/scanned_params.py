"""Conversion between a parameter tree with one subtree per layer and T5X's tree for a scan.

The parameters `encoder/layers_<i>/<name>` of all layers are stacked on axis 1 into one parameter
`encoder/encoder/<name>` (and likewise for the decoder, as in T5X's scalable T5, and for CLIP's
towers). T5X's tree has a relative position table in every layer. If all tables are equal, they are
copies of T5's one table per stack; if they differ, every layer has a separate table
(`T5Config.relative_bias_per_layer`, umT5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mpt_jax.core.tree import flatten, unflatten

LAYER_AXIS = 1
_STACKS = "encoder|decoder|image_encoder|text_encoder"  # of T5 and CLIP
_LAYER = re.compile(rf"({_STACKS})/layers_(\d+)/(.+)")
_STACKED = re.compile(rf"({_STACKS})/\1/(.+)")


def is_stacked(params: Mapping[str, Any]) -> bool:
    """Whether a tree holds stacked layers."""
    return any(_STACKED.fullmatch(name) for name in flatten(params))


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree for `scan_layers=True`, with stacked layers.

    `unstack_layers` is the exact inverse.

    Raises:
        ValueError: a layer lacks a parameter that another layer of its stack has.
    """
    stacked: dict[str, Any] = {}
    layers: dict[str, dict[int, Any]] = {}
    for name, leaf in flatten(params).items():
        match = _LAYER.fullmatch(name)
        if match is None:
            stacked[name] = leaf
        else:
            stack, index, rest = match.groups()
            layers.setdefault(f"{stack}/{stack}/{rest}", {})[int(index)] = leaf
    for name, leaves in layers.items():
        missing = sorted(set(range(max(leaves) + 1)) - set(leaves))
        if missing:
            stack, _, rest = name.split("/", 2)
            raise ValueError(
                f"The parameter {rest} is missing from these layers of the {stack}, although other "
                f"layers have it: {', '.join(map(str, missing))}. The checkpoint may be "
                "incomplete: download or copy it again."
            )
        ordered = [leaves[i] for i in range(len(leaves))]
        stacked[name] = _numpy_of(ordered[0]).stack(ordered, axis=LAYER_AXIS)
    return unflatten(stacked)


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree with one subtree per layer; the inverse of `stack_layers`.

    Relative position tables that are equal in all layers become one table for the stack.
    """
    leaves: dict[str, Any] = {}
    for name, leaf in flatten(params).items():
        match = _STACKED.fullmatch(name)
        if match is None:
            leaves[name] = leaf
            continue
        stack, rest = match.groups()
        parts = [leaf.take(i, axis=LAYER_AXIS) for i in range(leaf.shape[LAYER_AXIS])]
        if rest.startswith("relpos_bias/") and all((part == parts[0]).all() for part in parts):
            leaves[f"{stack}/{rest}"] = parts[0]
        else:
            leaves.update({f"{stack}/layers_{i}/{rest}": part for i, part in enumerate(parts)})
    return unflatten(leaves)


def layers_of_leaf(name: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """Yields the unscanned name and the values of each layer of a leaf. A leaf that does
    not hold stacked layers is yielded unchanged."""
    if (match := _STACKED.fullmatch(name)) is None:
        yield name, leaf
        return
    stack, rest = match.groups()
    for i in range(leaf.shape[LAYER_AXIS]):
        yield f"{stack}/layers_{i}/{rest}", leaf[:, i]


def layer_kernels(params: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns the weights [in, out] of every layer, by path without the number of the layer
    (`encoder/attention/query`), in the order of layers."""
    found: dict[str, dict[int, Any]] = {}
    for name, leaf in flatten(params).items():
        if not name.endswith("/kernel"):
            continue
        for of_layer, kernel in layers_of_leaf(name, leaf):
            if match := _LAYER.fullmatch(of_layer):
                stack, number, rest = match.groups()
                found.setdefault(f"{stack}/{rest.removesuffix('/kernel')}", {})[int(number)] = (
                    kernel
                )
    return {path: [kernels[i] for i in sorted(kernels)] for path, kernels in found.items()}


def _numpy_of(x: Any) -> Any:
    """Returns `jax.numpy` for device arrays and tracers, NumPy for arrays from a file."""
    return np if isinstance(x, np.ndarray) else jax.numpy
