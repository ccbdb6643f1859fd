"""Layer norm and attention softmax with backward passes that store as little as possible.

Automatic differentiation would need most of T5's activation memory for these two operations: for
each attention two arrays of the size of the scores, and for each norm two arrays of the size of the
residual stream. The backward passes below compute the same gradients from arrays that are stored in
any case: the output of the softmax and the input of the norm. Both support reverse mode only.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Bool, Float

# Added to the score of a masked pair. It is finite, so that a row without any allowed pair
# (padding in a packed batch) has no NaN.
MASKED = -1e10


def masked_softmax(
    scores: Float[Array, "B N Q K"],
    bias: Float[Array, "1 N Q K"] | None,
    mask: Bool[Array, "#B 1 #Q K"],
    dtype: jnp.dtype,
) -> Float[Array, "B N Q K"]:
    """Returns `softmax(scores + bias)` over the keys that the mask allows, in `dtype`.

    Computes in float32. For the backward pass it stores only the returned probabilities, which the
    product with the values stores anyway.
    """
    probabilities: jax.Array = _softmax(scores, bias, mask, dtype)
    return probabilities


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _softmax(scores, bias, mask, dtype) -> Any:
    return _softmax_forward(scores, bias, mask, dtype)[0]


def _softmax_forward(scores, bias, mask, dtype):
    biased = scores if bias is None else scores + bias
    biased = biased + jnp.where(mask, 0.0, MASKED)
    weights = jnp.exp(biased - jnp.max(biased, axis=-1, keepdims=True))
    probabilities = (weights / jnp.sum(weights, axis=-1, keepdims=True)).astype(dtype)
    return probabilities, (probabilities, bias is None)


def _softmax_backward(dtype, kept, slope):
    probabilities, unbiased = kept
    probabilities, slope = probabilities.astype(jnp.float32), slope.astype(jnp.float32)
    mean = jnp.sum(probabilities * slope, axis=-1, keepdims=True)
    slope = probabilities * (slope - mean)
    # A stack has one bias for the whole batch. The sum is not computed if it is not used.
    return slope, None if unbiased else jnp.sum(slope, axis=0, keepdims=True), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def over_rows(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes a vector [H] so that it broadcasts over `x` [..., H]."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def rms_norm(
    x: Float[Array, "*rows H"], scale: Float[Array, "H"], epsilon: float, dtype: jnp.dtype
) -> Float[Array, "*rows H"]:
    """Returns `x / rms(x) * scale` in `dtype`, with statistics computed in float32. Stores `x`,
    `scale` and 1 / rms for the backward pass."""
    y: jax.Array = _norm(x, scale, epsilon, dtype)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _norm(x, scale, epsilon, dtype) -> Any:
    return _norm_forward(x, scale, epsilon, dtype)[0]


def _norm_forward(x, scale, epsilon, dtype):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    y = (wide * inverse).astype(dtype) * over_rows(scale.astype(dtype), x)
    return y, (x, inverse, scale)


def _norm_backward(epsilon, dtype, kept, slope):
    x, inverse, scale = kept
    slope, normed = slope.astype(jnp.float32), x.astype(jnp.float32) * inverse
    scale_slope = jnp.sum(slope * normed, axis=tuple(range(x.ndim - 1)))
    slope = slope * over_rows(scale.astype(jnp.float32), x)
    slope = inverse * (slope - normed * jnp.mean(slope * normed, axis=-1, keepdims=True))
    return slope.astype(x.dtype), scale_slope.astype(scale.dtype)


_norm.defvjp(_norm_forward, _norm_backward)
