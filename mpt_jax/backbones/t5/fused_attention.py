"""Custom attention kernels for TPUs, which keep the scores in on-chip memory.

T5 adds a bias to every pair of positions, so standard flash attention does not apply. But T5's
rows are short: the scores of one head of one example, `[T,T]` in float32, fit in VMEM together with
the bias, which stays in VMEM while the kernel loops over the examples. No array of the size of the
scores is therefore written to main memory or read from it, forward or backward. The kernel for
self-attention reads heads directly from the output of one matrix product for all projections.

Two kernels, each with a backward pass that recomputes the probabilities:

    self_attention     queries, keys and values in one array, head by head, with a bias
    cross_attention    queries over a memory that serves as keys and values (see `attention.py`)
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mpt_jax.backbones.t5.low_memory_ops import MASKED, masked_softmax
from mpt_jax.backbones.t5.tpu_kernels import LANES, VMEM_LIMIT_BYTES, product
from mpt_jax.core.shapes import Array, Float, Int

# Most scores of a head (float32, 4 MiB: 1024 x 1024); the backward pass has four such arrays.
MOST_SCORES = 1 << 20
MOST_BIAS_BYTES = 8 << 20


class Heads(NamedTuple):
    """Order of the columns in a joint projection of queries, keys and values.

    Columns are ordered by blocks of heads. Each block has all its queries, then all its keys, then
    all its values.

    Attributes:
        number: the number of heads N.
        width: the width of a head D.
        in_block: the number of heads per block.
    """

    number: int
    width: int
    in_block: int

    @classmethod
    def of(cls, number: int, width: int, length: int) -> Heads:
        """Returns the order with the largest blocks whose bias takes at most MOST_BIAS_BYTES, or
        with the smallest possible blocks if none fit."""
        whole = [n for n in range(1, number + 1) if number % n == 0 and n * width % LANES == 0]
        fitting = [n for n in whole if n * length * length * 4 <= MOST_BIAS_BYTES]
        return cls(number, width, max(fitting) if fitting else min(whole, default=number))

    def join(self, kernels: list[jax.Array]) -> jax.Array:
        """Joins the weights [H,ND] of queries, keys and values into [H,3ND]."""
        blocks = [x.reshape(x.shape[0], -1, self.in_block * self.width) for x in kernels]
        return jnp.stack(blocks, axis=2).reshape(kernels[0].shape[0], -1)

    def part(self, joined: jax.Array) -> list[jax.Array]:
        """Splits [B,T,3ND] into queries, keys and values, each [B,N,T,D]."""
        batch, length, _ = joined.shape
        x = joined.reshape(batch, length, -1, 3, self.in_block, self.width)
        x = x.transpose(3, 0, 2, 4, 1, 5).reshape(3, batch, self.number, length, self.width)
        return [x[0], x[1], x[2]]

    def scale_values(self, joined: jax.Array, factors: jax.Array) -> jax.Array:
        """Multiplies the values in [B,T,3ND] by factors [B,N,T]."""
        batch, length, _ = joined.shape
        x = joined.reshape(batch, length, -1, 3, self.in_block, self.width)
        values = factors.transpose(0, 2, 1).reshape(*x.shape[:3], 1, self.in_block, 1)
        is_value = jnp.arange(3)[:, None, None] == 2
        return (x * jnp.where(is_value, values, 1)).reshape(joined.shape)


def self_attention_fits(length: int) -> bool:
    """Whether `self_attention` supports rows of this length."""
    return length * length <= MOST_SCORES


def over_memory_fits(queries: int, length: int, width: int, itemsize: int) -> bool:
    """Whether the backward pass of `cross_attention` fits in VMEM.

    Args:
        queries: the number of queries per example, counted over all heads on one device.
        length: the length T of the memory.
        width: the model width H.
        itemsize: the number of bytes per element of the arrays.
    """
    scores = 4 * 4 * queries * length  # probabilities, gradients and intermediates, float32
    sums = 4 * (queries + 2 * length) * width  # products in float32 before rounding
    blocks = 2 * itemsize * (3 * queries + 2 * length) * width  # one in use, one being copied
    return scores + sums + blocks <= 3 * VMEM_LIMIT_BYTES // 4


# --- Self-attention ------------------------------------------------------------------------------


def reference_self_attention(
    joined: Float[Array, "B T joined"],
    bias: Float[Array, "N T T"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B T"]],
    heads: Heads,
) -> Float[Array, "B T ND"]:
    """Reference implementation of `self_attention` in plain JAX operations."""
    query, key, value = heads.part(joined)
    scores = jnp.einsum("bnqd,bnkd->bnqk", query, key, preferred_element_type=jnp.float32)
    mask = (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    probabilities = masked_softmax(scores, bias[None], mask, joined.dtype)
    context = jnp.einsum("bnqk,bnkd->bnqd", probabilities, value)
    return context.transpose(0, 2, 1, 3).reshape(*joined.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def self_attention(
    joined: Float[Array, "B T joined"],
    bias: Float[Array, "N T T"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B T"]],
    heads: Heads,
    interpret: bool = False,
) -> Float[Array, "B T ND"]:
    """Computes attention of every position over the positions of its segment.

    Args:
        joined: the joint projection `x @ heads.join(kernels)`, with 3ND columns.
        bias: the bias to add to the scores, the same for all examples. If it is trainable, the
            backward pass of `reference_self_attention` is used.
        segments: two arrays: the segment of each query and the segment of each key. A query attends
            to the keys of its own segment. A masked key has a segment that no query has.
        heads: the order of the columns of `joined`.
        interpret: whether to run the kernel in interpreted mode, which is slow but needs no TPU.

    Returns:
        The outputs of all heads, concatenated. A query without any allowed key gets the mean of all
        values, as from a softmax over equal scores.
    """
    return _self_forward(joined, bias, segments, heads, interpret)


def _self_forward(joined, bias, segments, heads, interpret):
    batch, length, _ = joined.shape
    out = jax.ShapeDtypeStruct((batch, length, heads.number * heads.width), joined.dtype)
    kernel = functools.partial(_self_forward_kernel, heads=heads)
    return _run_blocks(kernel, [joined], bias, segments, out, heads, 2 * heads.width, interpret)


def _self_forward_kernel(joined, query_segments, key_segments, bias, out, *, heads):
    allowed = query_segments[0] == key_segments[0]
    for n in range(heads.in_block):
        q, k, v = (joined[_columns(heads, part, n)] for part in range(3))
        p = _probabilities(q, k, bias[n], allowed)
        out[_columns(heads, 0, n)] = product(p.astype(v.dtype), v, 1, 0).astype(out.dtype)


def _self_backward_kernel(joined, slope, query_segments, key_segments, bias, out, *, heads):
    allowed = query_segments[0] == key_segments[0]
    for n in range(heads.in_block):
        q, k, v = (joined[_columns(heads, part, n)] for part in range(3))
        p = _probabilities(q, k, bias[n], allowed)
        d_out = slope[_columns(heads, 0, n)]
        d_s = _slope_of_scores(p, product(d_out, v, 1, 1)).astype(q.dtype)
        grads = (
            product(d_s, k, 1, 0),
            product(d_s, q, 0, 0),
            product(p.astype(v.dtype), d_out, 0, 0),
        )
        for part, x in enumerate(grads):
            out[_columns(heads, part, n)] = x.astype(out.dtype)


def _self_forward_rule(joined, bias, segments, heads, interpret):
    segments = tuple(x.value for x in segments)
    out = _self_forward(joined.value, bias.value, segments, heads, interpret)
    return out, (joined.value, bias.value, segments, bias.perturbed)


def _self_backward_rule(heads, interpret, kept, slope) -> Any:
    joined, bias, segments, bias_is_trainable = kept
    if bias_is_trainable:
        _, pull = jax.vjp(
            lambda x, b: reference_self_attention(x, b, segments, heads), joined, bias
        )
        return (*pull(slope), None)
    out = jax.ShapeDtypeStruct(joined.shape, joined.dtype)
    kernel = functools.partial(_self_backward_kernel, heads=heads)
    grad = _run_blocks(
        kernel, [joined, slope], bias, segments, out, heads, 5 * heads.width, interpret
    )
    return grad, None, None


self_attention.defvjp(_self_forward_rule, _self_backward_rule, symbolic_zeros=True)


# --- Cross-attention: the memory serves as keys and values ---------------------------------------


def reference_over_memory(
    query: Float[Array, "B Q H"],
    memory: Float[Array, "B T H"],
    segments: tuple[Int[Array, "B Q"], Int[Array, "B T"]],
) -> Float[Array, "B Q H"]:
    """Reference implementation of `cross_attention` in plain JAX operations."""
    scores = jnp.einsum("bqh,bkh->bqk", query, memory, preferred_element_type=jnp.float32)
    mask = (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    probabilities = masked_softmax(scores[:, None], None, mask, query.dtype)[:, 0]
    return jnp.einsum("bqk,bkh->bqh", probabilities, memory)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_attention(
    query: Float[Array, "B Q H"],
    memory: Float[Array, "B T H"],
    segments: tuple[Int[Array, "B Q"], Int[Array, "B T"]],
    interpret: bool = False,
) -> Float[Array, "B Q H"]:
    """Computes attention of queries over the positions of a memory, without a bias.

    Args:
        query: the queries of all heads; Q counts every query position once per head.
        memory: the array that serves as both keys and values.
        segments: see `self_attention`.
        interpret: see `self_attention`.
    """
    return _memory_forward(query, memory, segments, interpret)


def _memory_forward(query, memory, segments, interpret):
    out = jax.ShapeDtypeStruct(query.shape, query.dtype)
    inner = 2 * query.shape[-1]
    return _run_blocks(
        _memory_forward_kernel, [query, memory], None, segments, out, None, inner, interpret
    )


def _memory_forward_kernel(query, memory, query_segments, key_segments, out):
    allowed = query_segments[0] == key_segments[0]
    p = _probabilities(query[0], memory[0], None, allowed)
    out[0] = product(p.astype(memory.dtype), memory[0], 1, 0).astype(out.dtype)


def _memory_backward_kernel(query, memory, slope, query_segments, key_segments, d_q, d_m):
    allowed = query_segments[0] == key_segments[0]
    p = _probabilities(query[0], memory[0], None, allowed)
    d_s = _slope_of_scores(p, product(slope[0], memory[0], 1, 1)).astype(query.dtype)
    d_q[0] = product(d_s, memory[0], 1, 0).astype(d_q.dtype)
    through_values = product(p.astype(memory.dtype), slope[0], 0, 0)
    d_m[0] = (through_values + product(d_s, query[0], 0, 0)).astype(d_m.dtype)


def _memory_forward_rule(query, memory, segments, interpret):
    return _memory_forward(query, memory, segments, interpret), (query, memory, segments)


def _memory_backward_rule(interpret, kept, slope) -> Any:
    query, memory, segments = kept
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, memory)]
    inner = 5 * query.shape[-1]
    arrays = [query, memory, slope]
    grads = _run_blocks(
        _memory_backward_kernel, arrays, None, segments, outs, None, inner, interpret
    )
    return (*grads, None)


cross_attention.defvjp(_memory_forward_rule, _memory_backward_rule)


# --- Shared by the kernels -----------------------------------------------------------------------


def _columns(heads: Heads, part: int, n: int) -> tuple[Any, ...]:
    """Returns the index of head `n` in a block's queries (0), keys (1) or values (2)."""
    return 0, slice(None), pl.ds((part * heads.in_block + n) * heads.width, heads.width)


def _probabilities(q, k, bias, allowed):
    """Returns the attention probabilities of one head: [Q,D], [M,D] -> [Q,M] float32."""
    scores = product(q, k, 1, 1)
    if bias is not None:
        scores = scores + bias
    scores = scores + jnp.where(allowed, 0.0, MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _slope_of_scores(p, d_p):
    return p * (d_p - jnp.sum(p * d_p, axis=-1, keepdims=True))


def _run_blocks(kernel, arrays, bias, segments, outputs, heads, inner, interpret) -> Any:
    """Calls a kernel for each block of heads and, in the inner loop, for each example.

    Args:
        kernel: the kernel, which takes a block of each array, of the segments of queries and keys,
            of the bias (if there is one) and of each output.
        arrays: the input arrays, `[B, positions, columns]`.
        bias: the bias [N,T,T], or None.
        segments: the segments of queries and of keys.
        outputs: the shape or shapes of the results.
        heads: the order of the columns, or None if there is only one block.
        inner: the number of multiply-adds for each pair of positions in a head, to estimate the
            cost of the kernel.
        interpret: see `self_attention`.
    """
    (batch, queries), keys = segments[0].shape, segments[1].shape[1]
    number, in_block = (1, 1) if heads is None else (heads.number, heads.in_block)
    blocks = number // in_block
    row = lambda x: pl.BlockSpec(  # noqa: E731
        (1, x.shape[1], x.shape[2] // blocks), lambda h, b: (b, 0, h)
    )
    inputs = [*arrays, segments[0][:, :, None], segments[1][:, None, :]]
    specs = [row(x) for x in arrays]
    specs.append(pl.BlockSpec((1, queries, 1), lambda h, b: (b, 0, 0)))
    specs.append(pl.BlockSpec((1, 1, keys), lambda h, b: (b, 0, 0)))
    if bias is not None:
        inputs.append(bias)
        specs.append(pl.BlockSpec((in_block, queries, keys), lambda h, b: (h, 0, 0)))
    pairs = batch * queries * keys * number
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs)))
    return pl.pallas_call(
        kernel,
        grid=(blocks, batch),
        in_specs=specs,
        out_specs=jax.tree.map(row, outputs),
        out_shape=outputs,
        cost_estimate=pl.CostEstimate(
            flops=2 * inner * pairs, transcendentals=pairs, bytes_accessed=moved
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        interpret=interpret,
        name=getattr(kernel, "func", kernel).__name__.strip("_"),
    )(*inputs)
