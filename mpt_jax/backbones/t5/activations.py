"""Activation functions of T5's feed-forward blocks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import jax

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def activated(names: tuple[str, ...], *inner: jax.Array) -> jax.Array:
    """Returns the product of the activations, one per input projection."""
    each = (ACTIVATIONS[name](x) for name, x in zip(names, inner, strict=True))
    return functools.reduce(operator.mul, each)
