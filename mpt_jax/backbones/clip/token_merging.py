"""Token merging (ToMe, Bolya et al. 2023, arXiv 2210.09461): similar tokens are replaced by their
mean, without parameters."""

from __future__ import annotations

import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Float


def merge_tokens(tokens: Float[Array, "I H"], count: int) -> Float[Array, "count H"]:
    """Returns at most `count` tokens, each the mean of one or several of those given.

    In each round, tokens at even positions are compared with those at odd positions. The pairs with
    the largest cosines are merged: at most half of the tokens, fewer in the last round.
    """
    sizes = jnp.ones(len(tokens), jnp.float32)
    tokens = tokens.astype(jnp.float32)
    while len(tokens) > count:
        merged = min(len(tokens) // 2, len(tokens) - count)
        unit = tokens / jnp.maximum(jnp.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
        cosines = unit[::2] @ unit[1::2].T
        order = jnp.argsort(-cosines.max(-1))
        moving, staying = order[:merged], jnp.sort(order[merged:])
        partner = cosines.argmax(-1)[moving]
        even, odd = sizes[::2], sizes[1::2]
        sums = tokens[1::2] * odd[:, None]
        sums = sums.at[partner].add(tokens[::2][moving] * even[moving][:, None])
        odd = odd.at[partner].add(even[moving])
        tokens = jnp.concatenate([tokens[::2][staying], sums / odd[:, None]])
        sizes = jnp.concatenate([even[staying], odd])
    return tokens
