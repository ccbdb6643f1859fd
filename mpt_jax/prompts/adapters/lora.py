"""Low-rank adapters: LoRA (Hu et al. 2022, arXiv 2106.09685), rsLoRA (Kalajdzievski 2023, arXiv
2312.03732) and DoRA (Liu et al. 2024, arXiv 2402.09353), with PEFT's conventions.

    y = x W + s (x A) B                       s = alpha / R, in rsLoRA alpha / sqrt(R)
    y = (m / |W + s A B|) o (x W + s (x A) B) in DoRA, with norms of columns

A [in, R] is uniform in +-1 / sqrt(in) and B [R, out] zero at the start, and m [out] is |W|. No
gradient passes through the norm (equation 11 of DoRA).

A packed row holds examples of several bank rows. It is multiplied with the factors of all K rows,
of which each position keeps those of its run. This takes K R columns, at most `MAX_COLUMNS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Float, Int, Key
from mpt_jax.prompts.adapters.base import Adapter, of_examples
from mpt_jax.prompts.base import FLOAT32, register

MAX_COLUMNS = 512  # beyond this, the products with all rows' factors cost as much as those with W


class LowRank(NamedTuple):
    """`y + x A B`, with the factors of each example; B includes s."""

    a: Float[Array, "*layers B in R"]
    b: Float[Array, "*layers B R out"]

    def __call__(self, x: jax.Array, kernel: jax.Array, y: jax.Array) -> jax.Array:
        inner = jnp.einsum("bti,bir->btr", x, self.a.astype(x.dtype))
        return y + jnp.einsum("btr,bro->bto", inner, self.b.astype(x.dtype)).astype(y.dtype)


class PackedLowRank(NamedTuple):
    """`y + x A B`, with the factors of all bank rows and the bank row of each position."""

    a: Float[Array, "*layers K in R"]
    b: Float[Array, "*layers K R out"]
    rows: Int[Array, "*layers B positions"]

    def __call__(self, x: jax.Array, kernel: jax.Array, y: jax.Array) -> jax.Array:
        inner = jnp.einsum("bti,kir->btkr", x, self.a.astype(x.dtype))
        own = jax.nn.one_hot(self.rows, self.a.shape[0], dtype=x.dtype)
        inner = inner * own[..., None]
        return y + jnp.einsum("btkr,kro->bto", inner, self.b.astype(x.dtype)).astype(y.dtype)


class Decomposed(NamedTuple):
    """`(m / |W + A B|) o (y + x A B)`, given the update by A and B."""

    low_rank: LowRank | PackedLowRank
    magnitude: Float[Array, "*layers K out"]

    def __call__(self, x: jax.Array, kernel: jax.Array, y: jax.Array) -> jax.Array:
        a, b, *rows = self.low_rank
        norms = jax.lax.stop_gradient(_column_norms(kernel.astype(jnp.float32), a, b))
        scale = self.magnitude / norms
        scale = scale[rows[0]] if rows else scale[:, None]
        return (scale * self.low_rank(x, kernel, y).astype(jnp.float32)).astype(y.dtype)


def _column_norms(
    kernel: Float[Array, "in out"], a: Float[Array, "K in R"], b: Float[Array, "K R out"]
) -> Float[Array, "K out"]:
    """Returns the norms of the columns of W + A B, without computing this matrix of each row."""
    onto = jnp.einsum("kir,io->kro", a, kernel, precision=FLOAT32)
    gram = jnp.einsum("kir,kiq->krq", a, a, precision=FLOAT32)
    cross = 2 * (onto * b).sum(-2)
    own = (jnp.einsum("krq,kqo->kro", gram, b, precision=FLOAT32) * b).sum(-2)
    return jnp.sqrt(jnp.square(kernel).sum(0)[None] + cross + own)


@register
@dataclasses.dataclass(frozen=True)
class LoRA(Adapter):
    """`y = x W + s (x A) B`.

    Parameters, for each kind of layer: `a` [K, layers, in, R], `b` [K, layers, R, out].

    Attributes:
        rank: R.
        alpha: the numerator of s.
        rank_stabilized: whether s is alpha / sqrt(R) (rsLoRA) instead of alpha / R.

    Raises:
        ValueError: see `Adapter`; or the rank is less than 1, or alpha is not positive and
            finite.
    """

    target_modules: Sequence[str] = ("q", "v")
    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False

    name = "lora"

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(
                f"The rank of {self.name!r} is {self.rank} and its alpha {self.alpha}, but the "
                "rank must be at least 1, and alpha positive and finite. Correct LORA_RANK or "
                "LORA_ALPHA."
            )

    @property
    def scale(self) -> float:
        """s, the factor of the product of A and B."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def axes(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The logical axes of the parameters."""
        found = {}
        for layer in self.layers:
            inputs, outputs = self.kernel_axes(layer)
            found[f"{layer}/a"] = ("tasks", "layers", inputs, "rank")
            found[f"{layer}/b"] = ("tasks", "layers", "rank", outputs)
        return found

    def init_layer(self, key: Key, kernels: Sequence[Any]) -> dict[str, Array]:
        inputs, outputs = kernels[0].shape
        if self.rank > min(inputs, outputs):
            raise ValueError(
                f"The rank of {self.name!r} is {self.rank}, but a module of TARGET_MODULES has "
                f"weights of {inputs} x {outputs}. Set LORA_RANK to at most {min(inputs, outputs)}."
            )
        limit, depth = 1 / math.sqrt(inputs), len(kernels)
        a = jax.random.uniform(key, (depth, inputs, self.rank), minval=-limit, maxval=limit)
        return {"a": a, "b": jnp.zeros((depth, self.rank, outputs))}

    def update_layer(self, params, rows, packed):
        if not packed:
            a, b = of_examples(params["a"], rows), of_examples(params["b"], rows)
            return LowRank(a, self.scale * b)
        a, b = jnp.moveaxis(params["a"], 1, 0), jnp.moveaxis(params["b"], 1, 0)
        depth, count, _, rank = a.shape
        if count * rank > MAX_COLUMNS:
            raise ValueError(
                f"Packed rows of {count} runs with factors of rank {rank} would multiply every "
                f"position with {count * rank} columns; at most {MAX_COLUMNS} are supported. Leave "
                "out gin/runs/packed.gin, or train fewer runs in one job."
            )
        return PackedLowRank(a, self.scale * b, jnp.broadcast_to(rows, (depth, *rows.shape)))

    def config(self):
        return {
            "target_modules": list(self.target_modules),
            "rank": self.rank,
            "alpha": self.alpha,
            "rank_stabilized": self.rank_stabilized,
        }


@register
@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """`y = (m / |W + s A B|) o (x W + s (x A) B)`.

    Parameters, for each kind of layer: those of `LoRA`, and `m` [K, layers, out].
    """

    name = "dora"

    @property
    def axes(self):
        """The logical axes of the parameters."""
        own = {f"{x}/m": ("tasks", "layers", self.kernel_axes(x)[1]) for x in self.layers}
        return super().axes | own

    def init_layer(self, key: Key, kernels: Sequence[Any]) -> dict[str, Array]:
        norms = [jnp.linalg.norm(jnp.asarray(x, jnp.float32), axis=0) for x in kernels]
        return super().init_layer(key, kernels) | {"m": jnp.stack(norms)}

    def update_layer(self, params, rows, packed):
        low_rank = super().update_layer(params, rows, packed)
        m = jnp.moveaxis(params["m"], 1, 0) if packed else of_examples(params["m"], rows)
        return Decomposed(low_rank, m)
