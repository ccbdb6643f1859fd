"""The configuration of a T5, inferred from its parameters, for checkpoints without one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpt_jax.backbones.t5 import T5Config, parameter_shapes
from mpt_jax.core.tree import flatten, match_exactly, unflatten

# Shapes do not show this value. It is assumed to be that of every published T5, and the user is
# informed.
ASSUMED = "relative_attention_max_distance=128"
_TABLE_NAME = "relpos_bias/rel_embedding"
_TABLE = re.compile(rf"(encoder|decoder)/(layers_0/)?{_TABLE_NAME}")


def config_of_tree(params: Mapping[str, Any], what: str = "The checkpoint") -> T5Config:
    """Infers the configuration of a T5 from its unscanned tree.

    The number of heads is the first dimension of the relative position tables. Shapes do not show
    the activations, so they are assumed: `relu` as in T5 1.0 if the feed-forward has one input
    projection, gated `gelu` as in T5 1.1 if it has two.

    Args:
        params: the unscanned tree.
        what: the name of the checkpoint in errors.

    Raises:
        ValueError: the parameters are not those of a T5; the message names parameters that are
            missing, unexpected or have another shape.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(params).items()}
    wanted = ("token_embedder/embedding", "encoder/layers_0/attention/query/kernel")
    tables = [name for name in shapes if _TABLE.fullmatch(name)]
    gated = "encoder/layers_0/mlp/wi_0/kernel"
    inner = gated if gated in shapes else gated.replace("wi_0", "wi")
    missing = [name for name in (*wanted, inner) if name not in shapes]
    if missing or not tables:
        raise ValueError(
            f"{what} does not have the parameters of a T5: it lacks "
            f"{', '.join(missing) or 'a relative position table'}. Use a T5 checkpoint. The first "
            f"parameters found are {', '.join(sorted(shapes)[:5]) or 'none'}."
        )
    flat = [name for name in (*wanted, inner, tables[0]) if len(shapes[name]) != 2]
    if flat or 0 in shapes[tables[0]]:
        bad = (flat or tables)[0]
        raise ValueError(
            f"{what} does not have the parameters of a T5: {bad} has shape {shapes[bad]}. Use a T5 "
            "checkpoint."
        )
    heads, buckets = shapes[tables[0]]
    config = T5Config(
        vocab_size=shapes[wanted[0]][0],
        emb_dim=shapes[wanted[0]][1],
        num_heads=heads,
        num_encoder_layers=_layers(shapes, "encoder"),
        num_decoder_layers=_layers(shapes, "decoder"),
        head_dim=shapes[wanted[1]][1] // heads,
        mlp_dim=shapes[inner][1],
        mlp_activations=("gelu", "linear") if inner == gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in shapes,
        relative_attention_num_buckets=buckets,
        relative_bias_per_layer="layers_0" in tables[0],
        biases=any(name.endswith("/bias") for name in shapes),
    )
    advice = "Use a complete checkpoint of a T5, or set --config to its configuration."
    match_exactly(parameter_shapes(config), shapes, what, standard="a T5", advice=advice)
    return config


def with_tables(params: Mapping[str, Any], in_every_layer: bool) -> dict[str, Any]:
    """Returns the tree with one relative position table per layer, or with one per stack.

    If all tables of a stack are equal, as they always are in a stack of one layer, both forms are
    the same model, and a scanned tree does not show which form it came from. Tables that differ
    stay in their layers.

    Args:
        params: the unscanned tree.
        in_every_layer: whether to return one table per layer rather than one per stack.
    """
    leaves = dict(flatten(params))
    for stack in ("encoder", "decoder"):
        shared = f"{stack}/{_TABLE_NAME}"
        by_layer = [f"{stack}/layers_{i}/{_TABLE_NAME}" for i in range(_layers(leaves, stack))]
        if in_every_layer and shared in leaves:
            leaves |= dict.fromkeys(by_layer, leaves.pop(shared))
        elif not in_every_layer and by_layer and set(by_layer) <= set(leaves):
            tables = [leaves[name] for name in by_layer]
            if all(np.array_equal(table, tables[0]) for table in tables):
                leaves[shared] = tables[0]
                leaves = {name: x for name, x in leaves.items() if name not in by_layer}
    return unflatten(leaves)


def with_even_tables(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree with one relative position table per layer in both stacks if either stack
    has tables per layer; otherwise returns the tree unchanged."""
    per_layer = any(_TABLE.fullmatch(name) and "layers_0" in name for name in flatten(params))
    return with_tables(params, in_every_layer=True) if per_layer else dict(params)


def _layers(shapes: Mapping[str, Any], stack: str) -> int:
    """Returns the number of layers of a stack. Raises ValueError if a layer number is missing."""
    matches = (re.match(rf"{stack}/layers_(\d+)/", name) for name in shapes)
    found = {int(match[1]) for match in matches if match}
    if missing := sorted(set(range(len(found))) - found):
        raise ValueError(
            f"Layer {missing[0]} of the {stack} is missing, although {len(found)} layers exist. "
            "The checkpoint may be incomplete: download or copy it again."
        )
    return len(found)
