"""Pallas kernel of T5 1.1's gated feed-forward block, for TPUs.

`y = (act(x gate) * (x linear) * kept) out`, where the three matrices are T5X's `wi_0`, `wi_1` and
`wo`, and `kept` is dropout. Plain operations write the two inner products, each `[B,T,F]`, to main
memory, and read them and their gradients several times. In the kernel they never leave on-chip
memory: the matrices stay there while the kernel loops over blocks of rows, and the backward pass
recomputes the inner products from `x`. A training step then has eight products with a matrix
instead of six. This pays off on chips on which the step is bound by memory, and if the matrices are
small enough to stay in on-chip memory.

The backward pass of the kernel is for frozen matrices. If a matrix is trainable, the plain
operations of `reference_gated_mlp` are used, forward and backward.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mpt_jax.backbones.t5.activations import activated
from mpt_jax.backbones.t5.tpu_kernels import LANES, VMEM_LIMIT_BYTES, product
from mpt_jax.core.shapes import Array, Float

# On v5p, which has fewer operations per byte of bandwidth, recomputing costs more than it saves.
BOUND_BY_MEMORY = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")
LEAST_POSITIONS = 128  # with fewer in a row, the matrix unit would mostly load weights
MOST_POSITIONS = 512  # of a block
MOST_COLUMNS = 1024  # of the inner products that are in on-chip memory at a time
SUBLANES = 16  # a block of bfloat16 has a multiple of this many positions, or all of a row

Matrices = tuple[Float[Array, "H F"], Float[Array, "H F"], Float[Array, "F H"]]


def fits(length: int, width: int, inner: int, itemsize: int) -> bool:
    """Whether rows are long enough for the kernel, and its backward pass fits in VMEM.

    Args:
        length: the length T of a row.
        width: the model width H.
        inner: the feed-forward width F.
        itemsize: the number of bytes per element of the arrays.
    """
    positions = _positions(length)
    matrices = 3 * width * inner * itemsize
    blocks = 2 * 3 * positions * width * itemsize  # one in use, one being copied
    sums = 2 * 4 * positions * width  # the result in float32, and a product to add to it
    products = 8 * 4 * positions * min(inner, MOST_COLUMNS)  # and gradients, float32
    needed = matrices + blocks + sums + products
    return length >= LEAST_POSITIONS and needed <= 3 * VMEM_LIMIT_BYTES // 4


def _positions(length: int) -> int:
    """Returns the number of positions of a block: a whole row, or equal parts of it."""
    parts = pl.cdiv(length, MOST_POSITIONS)
    return length if parts == 1 else pl.cdiv(pl.cdiv(length, parts), SUBLANES) * SUBLANES


def reference_gated_mlp(
    x: Float[Array, "B T H"],
    matrices: Matrices,
    kept: Float[Array, "B 1 F"] | None,
    activations: tuple[str, ...],
) -> Float[Array, "B T H"]:
    """Reference implementation of `gated_mlp` in plain JAX operations."""
    gate, linear, out = matrices
    hidden = jax.checkpoint(activated, static_argnums=0)(activations, x @ gate, x @ linear)
    if kept is not None:
        hidden = hidden * kept.astype(hidden.dtype)
    return hidden @ out


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def gated_mlp(
    x: Float[Array, "B T H"],
    matrices: Matrices,
    kept: Float[Array, "B 1 F"] | None,
    activations: tuple[str, ...],
    interpret: bool = False,
) -> Float[Array, "B T H"]:
    """Computes the gated feed-forward block (Shazeer 2020) without storing its inner products.

    Args:
        x: the normalized input of the block.
        matrices: the weights of the two input projections and of the output projection.
        kept: dropout of the inner products, the same for all positions of a row: 0, or
            1 / (1 - rate). None means no dropout. It is not differentiated.
        activations: the activation of each input projection.
        interpret: whether to run the kernel in interpreted mode, which is slow but needs no TPU.
    """
    return _forward(x, matrices, kept, activations, interpret)


def _forward(x, matrices, kept, activations, interpret) -> Any:
    kernel = functools.partial(_mlp_forward_kernel, activations=activations)
    return _run_blocks(kernel, [x], matrices, kept, 3, interpret)


def _mlp_forward_kernel(x, gate, linear, out, kept, y, *, activations):
    total = jnp.zeros(y.shape[1:], jnp.float32)
    for columns in _columns(gate.shape[1]):
        inner = (product(x[0], matrix[:, columns], 1, 0) for matrix in (gate, linear))
        hidden = activated(activations, *inner)
        if kept is not None:
            hidden = hidden * kept[0, :, columns]
        total += product(hidden.astype(x.dtype), out[columns, :], 1, 0)
    y[0] = total.astype(y.dtype)


def _mlp_backward_kernel(x, slope, gate, linear, out, kept, d_x, *, activations):
    total = jnp.zeros(d_x.shape[1:], jnp.float32)
    for columns in _columns(gate.shape[1]):
        inner = [product(x[0], matrix[:, columns], 1, 0) for matrix in (gate, linear)]
        d_hidden = product(slope[0], out[columns, :], 1, 1)
        if kept is not None:
            d_hidden = d_hidden * kept[0, :, columns]
        _, pull = jax.vjp(functools.partial(activated, activations), *inner)
        for matrix, d_inner in zip((gate, linear), pull(d_hidden), strict=True):
            total += product(d_inner.astype(x.dtype), matrix[:, columns], 1, 1)
    d_x[0] = total.astype(d_x.dtype)


def _columns(inner: int) -> list[slice]:
    """Returns slices of the feed-forward width that are computed one after the other."""
    parts = pl.cdiv(inner, MOST_COLUMNS)
    size = pl.cdiv(pl.cdiv(inner, parts), LANES) * LANES
    return [slice(start, min(start + size, inner)) for start in range(0, inner, size)]


def _forward_rule(x, matrices, kept, activations, interpret) -> Any:
    values = tuple(matrix.value for matrix in matrices)
    mask = None if kept is None else kept.value
    if any(matrix.perturbed for matrix in matrices):
        plain = functools.partial(reference_gated_mlp, kept=mask, activations=activations)
        y, pull = jax.vjp(plain, x.value, values)
        return y, (pull, None)
    y = _forward(x.value, values, mask, activations, interpret)
    return y, (None, (x.value, values, mask))


def _backward_rule(activations, interpret, residuals, slope) -> Any:
    pull, stored = residuals
    if pull is not None:
        return (*pull(slope), None)
    x, matrices, kept = stored
    kernel = functools.partial(_mlp_backward_kernel, activations=activations)
    return _run_blocks(kernel, [x, slope], matrices, kept, 5, interpret), None, None


gated_mlp.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _run_blocks(kernel, arrays, matrices, kept, products, interpret) -> Any:
    """Calls a kernel for each block of positions of each row.

    Args:
        kernel: the kernel, which takes a block of each array, the matrices, the dropout of the row
            (or None) and a block of the result.
        arrays: the input arrays [B,T,H].
        matrices: see `gated_mlp`.
        kept: see `gated_mlp`.
        products: the number of products with a matrix, to estimate the cost of the kernel.
        interpret: see `gated_mlp`.
    """
    (batch, length, width), inner = arrays[0].shape, matrices[0].shape[1]
    positions = _positions(length)
    block = pl.BlockSpec((1, positions, width), lambda b, t: (b, t, 0))
    # All steps use the same block, so it is copied once and needs no second buffer.
    whole = [
        pl.BlockSpec(x.shape, lambda b, t: (0, 0), pipeline_mode=pl.Buffered(1)) for x in matrices
    ]
    of_row = None if kept is None else pl.BlockSpec((1, 1, inner), lambda b, t: (b, 0, 0))
    out = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    moved = sum(
        math.prod(x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves((arrays, matrices, kept, out))
    )
    elements = batch * length * inner
    return pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(length, positions)),
        in_specs=[*[block] * len(arrays), *whole, of_row],
        out_specs=block,
        out_shape=out,
        cost_estimate=pl.CostEstimate(
            flops=2 * products * elements * width, transcendentals=elements, bytes_accessed=moved
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(*arrays, *matrices, kept)
