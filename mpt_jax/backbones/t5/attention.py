"""Multi-head attention: plain operations, TPU kernels, and a cache for decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpt_jax.backbones.layer_updates import is_updated
from mpt_jax.backbones.t5 import fused_attention as fused
from mpt_jax.backbones.t5 import layers, tpu_kernels
from mpt_jax.backbones.t5.config import T5Config
from mpt_jax.backbones.t5.low_memory_ops import masked_softmax
from mpt_jax.core.shapes import Array, Bool, Float, Int


class Attention(nn.Module):
    """Multi-head attention of queries over a memory, which is the same sequence in self-attention.

    Unless `cache` is `'none'`, keys and values are stored in the `cache` collection. With `'self'`,
    the keys and values of new positions are written at `cache_index` into arrays `[B,N,M,D]`, which
    have room for M positions. With `'cross'`, the keys and values of the memory are computed once,
    unless the kernel is used, which needs neither (see `_over_memory`).
    The call that creates the cache does not read from it. The `cached_*` arrays differ between the
    hypotheses of an example; the `memory_*` arrays do not (see `decoding.py`).
    """

    config: T5Config
    deterministic: bool
    cache: Literal["none", "self", "cross"] = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B Q H"],
        memory: Float[Array, "B K H"],
        bias: Float[Array, "1 N Q M"] | None,
        mask: Bool[Array, "#B 1 #Q M"],
        cache_index: Int[Array, ""] | None = None,
        cache_length: int | None = None,
        segments: tuple[Int[Array, "B Q"], Int[Array, "B K"]] | None = None,
    ) -> Float[Array, "B Q H"]:
        cfg = self.config
        if segments is not None and self._uses_kernels():
            if bias is not None and fused.self_attention_fits(x.shape[1]):
                return self._out(self._self_attention(x, bias, segments))
            if bias is None and not self._drops and self._uses_encoder_output_directly(x, memory):
                # Also in decoding: all layers then read the one output of the encoder.
                return self._out(self._over_memory(x, memory, segments))
        query = self._heads("query", self._query_init)(x)
        compute = functools.partial(self._keys_and_values, memory)
        if self.cache == "none":
            key, value = compute()
        elif self.cache == "cross":
            key, value = self._cached_memory(compute)
        else:
            key, value = self._cached_positions(compute(), cache_index, cache_length)
        if self._drops:
            value = value * self._kept_keys(*memory.shape[:2])[..., None]
        scores_dtype = jnp.float32 if cfg.float32_attention_logits else None
        scores = jnp.einsum("bnqd,bnkd->bnqk", query, key, preferred_element_type=scores_dtype)
        probabilities = masked_softmax(scores.astype(jnp.float32), bias, mask, cfg.dtype)
        context = jnp.einsum("bnqk,bnkd->bnqd", probabilities, value)
        context = context.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        return self._out(context)

    def _out(self, context: Float[Array, "B Q ND"]) -> Float[Array, "B Q H"]:
        cfg = self.config
        axes = ("joined_kv", "embed")
        return layers.Dense(cfg.emb_dim, axes, cfg, layers.normal_fan_in, name="out")(context)

    @property
    def _drops(self) -> bool:
        return self.config.dropout_rate > 0 and not self.deterministic

    def _kept_keys(self, batch: int, length: int) -> Float[Array, "B N K"]:
        """Returns the dropout of the probabilities: 0, or 1 / (1 - rate).

        T5 drops a key for all queries at once, so the mask may be applied to the values: it costs
        no array as large as the probabilities, and the TPU kernel needs no dropout.
        """
        ones = jnp.ones((batch, self.config.num_heads, 1, length), self.config.dtype)
        return layers.Dropout(self.config, self.deterministic)(ones)[:, :, 0]

    @property
    def _query_init(self) -> layers.Initializer:
        """The initializer of the query weights. It includes the factor 1/sqrt(D), which T5 does not
        apply to the scores."""
        scale = self.config.head_dim**-0.5
        return lambda *args: layers.normal_fan_in(*args) * scale

    # --- On a TPU --------------------------------------------------------------------------------

    def _uses_kernels(self) -> bool:
        """Whether the kernels of `fused_attention` can be used for the call.

        They must be enabled (by default, on TPUs only), the call must not use a cache of positions,
        biases or updates, and the heads must split evenly over devices.
        """
        cfg = self.config
        enabled = tpu_kernels.on_tpu() if cfg.fused_attention is None else cfg.fused_attention
        return (
            enabled
            and self.cache != "self"
            and not cfg.biases
            and not is_updated(self)
            and cfg.num_heads % tpu_kernels.shards_of("heads") == 0
        )

    def _uses_encoder_output_directly(self, x: jax.Array, memory: jax.Array) -> bool:
        """Whether `_over_memory` fits in VMEM and takes fewer operations, forward and backward,
        than computing keys and values. It does if targets, or the tokens of a decoding step, are
        few."""
        cfg = self.config
        queries = cfg.num_heads // tpu_kernels.shards_of("heads") * x.shape[1]
        fits = fused.over_memory_fits(
            queries, memory.shape[1], cfg.emb_dim, jnp.dtype(cfg.dtype).itemsize
        )
        return 2 * x.shape[1] <= cfg.head_dim and fits

    def _kernels(self) -> list[Float[Array, "H ND"]]:
        """Returns the projection weights of queries, keys and values."""
        cfg = self.config
        shape, axes = (cfg.emb_dim, cfg.num_heads * cfg.head_dim), ("embed", "joined_kv")
        inits = {
            "query": self._query_init,
            "key": layers.normal_fan_in,
            "value": layers.normal_fan_in,
        }
        return [layers.Kernel(shape, axes, cfg, init, name=name)() for name, init in inits.items()]

    def _self_attention(
        self,
        x: Float[Array, "B T H"],
        bias: Float[Array, "1 N T T"],
        segments: tuple[Int[Array, "B T"], Int[Array, "B T"]],
    ) -> Float[Array, "B T ND"]:
        """Computes self-attention with one matrix product for queries, keys and values. The kernel
        reads its result without a transpose."""
        cfg = self.config
        heads = fused.Heads.of(
            cfg.num_heads // tpu_kernels.shards_of("heads"), cfg.head_dim, x.shape[1]
        )
        joined = x @ heads.join(self._kernels())
        if self._drops:
            joined = heads.scale_values(joined, self._kept_keys(*x.shape[:2]))
        joined = layers.constrain(joined, "batch", "length", "joined_kv")
        attend = lambda *arrays: fused.self_attention(*arrays, heads, not tpu_kernels.on_tpu())  # noqa: E731
        columns, rows = ("batch", "length", "joined_kv"), ("batch", "length")
        axes = (columns, ("heads", None, None), (rows, rows))
        return tpu_kernels.over_mesh(attend, (joined, bias[0], segments), axes, columns)

    def _over_memory(
        self,
        x: Float[Array, "B Q H"],
        memory: Float[Array, "B T H"],
        segments: tuple[Int[Array, "B Q"], Int[Array, "B T"]],
    ) -> Float[Array, "B Q ND"]:
        """Computes attention without keys or values of the memory e.

        Uses `q (e Wk)' = (q Wk') e'` for the scores and `p (e Wv) = (p e) Wv` for the context.

        If targets are short, projecting the queries of all heads onto the memory is cheaper than
        projecting every position of the memory, and creates no array as large as the memory.
        """
        cfg = self.config
        by_head = lambda a: a.reshape(*a.shape[:-1], cfg.num_heads, cfg.head_dim)  # noqa: E731
        to_query, *others = self._kernels()
        query, key, value = map(by_head, (x @ to_query, *others))
        onto = jnp.einsum("bqnd,hnd->bnqh", query, key)
        onto = onto.reshape(x.shape[0], -1, cfg.emb_dim)
        attend = lambda *arrays: fused.cross_attention(*arrays, not tpu_kernels.on_tpu())  # noqa: E731
        # Axis 1 has the heads, and within each head the query positions.
        queries, whole = ("batch", "heads", None), ("batch", "length", None)
        axes = (queries, whole, (queries[:2], whole[:2]))
        head_segments = (jnp.tile(segments[0], (1, cfg.num_heads)), segments[1])
        context = tpu_kernels.over_mesh(attend, (onto, memory, head_segments), axes, queries)
        context = context.reshape(x.shape[0], cfg.num_heads, x.shape[1], cfg.emb_dim)
        return jnp.einsum("bnqh,hnd->bqnd", context, value).reshape(*x.shape[:2], -1)

    # --- Everywhere ------------------------------------------------------------------------------

    def _heads(self, name: str, init: layers.Initializer) -> Callable[[jax.Array], jax.Array]:
        """Returns a projection `[B,T,H] -> [B,N,T,D]`: one matrix product, split into heads."""
        cfg = self.config
        width = cfg.num_heads * cfg.head_dim
        project = layers.Dense(width, ("embed", "joined_kv"), cfg, init, name=name)

        def apply(x: jax.Array) -> jax.Array:
            heads = project(x).reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)
            return layers.constrain(heads, "batch", "length", "heads", "kv").transpose(0, 2, 1, 3)

        return apply

    def _keys_and_values(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = self._heads("key", layers.normal_fan_in)(memory)
        value = self._heads("value", layers.normal_fan_in)(memory)
        return key, value

    def _cached_memory(
        self, compute: Callable[[], tuple[jax.Array, jax.Array]]
    ) -> tuple[jax.Array, jax.Array]:
        if not self.has_variable("cache", "memory_key"):
            key, value = compute()
            self.variable("cache", "memory_key", lambda: key)
            self.variable("cache", "memory_value", lambda: value)
        return self.get_variable("cache", "memory_key"), self.get_variable("cache", "memory_value")

    def _cached_positions(
        self,
        new: tuple[jax.Array, jax.Array],
        cache_index: jax.Array | None,
        cache_length: int | None,
    ) -> tuple[jax.Array, jax.Array]:
        creating = not self.has_variable("cache", "cached_key")
        kept = []
        for name, x in zip(("cached_key", "cached_value"), new, strict=True):
            batch, heads, _, width = x.shape
            shape = (batch, heads, cache_length, width)
            buffer = self.variable("cache", name, jnp.zeros, shape, x.dtype)
            if not creating:
                assert cache_index is not None, "the decoder passes cache_index whenever it caches"
                buffer.value = jax.lax.dynamic_update_slice_in_dim(
                    buffer.value, x, cache_index, axis=2
                )
            kept.append(buffer.value)
        return new if creating else (kept[0], kept[1])
