"""Parts of a T5 layer except attention: projections, norm, relative positions, feed-forward.

Parameter names, shapes, logical axes and initialization are T5X's. The arithmetic is T5's
(Raffel et al. 2020): no biases, no mean subtraction in the layer norm, no 1/sqrt(D) in the scores
(the initialization of the queries includes it), and one relative position table per stack (umT5 has
one per layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.partitioning import param_with_axes, with_sharding_constraint

from mpt_jax.backbones.layer_updates import is_updated, updated
from mpt_jax.backbones.t5 import fused_mlp, tpu_kernels
from mpt_jax.backbones.t5.activations import activated
from mpt_jax.backbones.t5.config import T5Config
from mpt_jax.backbones.t5.low_memory_ops import over_rows, rms_norm
from mpt_jax.core.shapes import Array, Float, Int

Initializer = Callable[..., jax.Array]
normal_fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_truncated_fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Constrains the sharding of an activation by its logical axes. No-op without a mesh."""
    return with_sharding_constraint(x, axes)


class Dense(nn.Module):
    """`x W`, plus a bias if the configuration has biases."""

    features: int
    axes: tuple[str, str]
    config: T5Config
    kernel_init: Initializer = _truncated_fan_in

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.config.dtype
        kernel = _kernel(self.kernel_init, (x.shape[-1], self.features), self.axes, dtype)
        y = jnp.dot(x.astype(dtype), kernel)
        if self.config.biases:
            bias = param_with_axes(
                "bias", nn.initializers.zeros, (self.features,), jnp.float32, axes=self.axes[1:]
            )
            y = y + over_rows(jnp.asarray(bias, dtype), y)
        return updated(self, x, kernel, y)


class Kernel(nn.Module):
    """The weights of a `Dense` layer in the compute dtype, without its matrix product."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    config: T5Config
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> jax.Array:
        return _kernel(self.kernel_init, self.shape, self.axes, self.config.dtype)


def _kernel(
    init: Initializer, shape: tuple[int, int], axes: tuple[str, str], dtype: jnp.dtype
) -> jax.Array:
    """Returns the weights of a projection, a parameter of the calling module, in `dtype`."""
    return jnp.asarray(param_with_axes("kernel", init, shape, jnp.float32, axes=axes), dtype)


class LayerNorm(nn.Module):
    """`x / rms(x) * scale`, plus a bias if the configuration has biases.

    The mean square is computed in float32.
    """

    config: T5Config
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.config.dtype
        shape = (x.shape[-1],)
        scale = param_with_axes("scale", nn.initializers.ones, shape, jnp.float32, axes=("embed",))
        y = rms_norm(x, jnp.asarray(scale), self.epsilon, dtype)
        if self.config.biases:
            bias = param_with_axes(
                "bias", nn.initializers.zeros, shape, jnp.float32, axes=("embed",)
            )
            y = y + over_rows(jnp.asarray(bias, dtype), y)
        return y


class Embed(nn.Module):
    """Token embedding table; also computes the logits if they are tied to it (T5 1.0)."""

    config: T5Config

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.emb_dim)
        self.embedding = param_with_axes(
            "embedding", nn.initializers.normal(1.0), shape, jnp.float32, axes=("vocab", "embed")
        )

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T H"]:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)
        return constrain(x, "batch", "length", "embed")

    def attend(self, x: Float[Array, "B L H"]) -> Float[Array, "B L V"]:
        """Returns logits from the tied embedding table, in float32, scaled by H^-0.5."""
        scores = float32_product("blh,vh->blv", x, jnp.asarray(self.embedding))
        return scores / math.sqrt(self.config.emb_dim)


def float32_product(spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes an einsum with a float32 result, without a float32 copy of a bfloat16 kernel."""
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    return jnp.einsum(
        spec, x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32
    )


class OutputProjection(nn.Module):
    """T5 1.1's separate output projection, which returns logits in float32."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "B L H"]) -> Float[Array, "B L V"]:
        shape = (self.config.emb_dim, self.config.vocab_size)
        kernel = param_with_axes(
            "kernel", _truncated_fan_in, shape, jnp.float32, axes=("embed", "vocab")
        )
        return float32_product("blh,hv->blv", x, jnp.asarray(kernel))


class LogitsBias(nn.Module):
    """A trainable bias of the logits, which BitFit adds to T5's head."""

    config: T5Config

    @nn.compact
    def __call__(self, logits: Float[Array, "B L V"]) -> Float[Array, "B L V"]:
        shape = (self.config.vocab_size,)
        bias = param_with_axes("bias", nn.initializers.zeros, shape, jnp.float32, axes=("vocab",))
        return logits + over_rows(jnp.asarray(bias), logits)


def distance_buckets(
    length: int, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Returns the bucket of each distance (key position - query position), for all distances from
    -(length - 1) to length - 1 in order.

    Half of the buckets cover a single distance each, and the others cover logarithmically growing
    ranges up to `max_distance`; the last also covers all larger distances (Raffel et al. 2020,
    section 2.1). If `bidirectional` is True, half of the buckets are for keys after the query. If
    it is False, as in a decoder, all keys after the query share the bucket of distance 0.
    """
    distance = np.arange(1 - length, length)
    rows = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        rows = np.where(distance > 0, num_buckets, 0)
        behind = np.abs(distance)
    else:
        behind = np.maximum(-distance, 0)
    exact = num_buckets // 2
    # The epsilon avoids log(0). float32, as in the original, decides ties at bucket edges.
    ratio = behind.astype(np.float32) / exact + np.finfo(np.float32).eps
    growth = np.log(ratio) / np.log(max_distance / exact)
    far = np.minimum(exact + (growth * (num_buckets - exact)).astype(np.int32), num_buckets - 1)
    return rows + np.where(behind < exact, behind, far)


def toeplitz(values: Float[Array, "N W"], rows: int) -> Float[Array, "N rows cols"]:
    """Returns `out[n, q, k] = values[n, k - q + rows - 1]`, by tiling and skewing instead of a
    gather."""
    heads, width = values.shape
    padded = jnp.pad(values, ((0, 0), (0, 1)))
    flat = jnp.broadcast_to(padded[:, None], (heads, rows, width + 1)).reshape(heads, -1)
    skewed = flat[:, : rows * width].reshape(heads, rows, width)
    return skewed[:, :, rows - 1 :]


class RelativePositionBias(nn.Module):
    """Bias added to the attention scores, which depends only on key position - query position."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(
        self, queries: int, keys: int, first_query: Int[Array, ""] | int = 0
    ) -> Float[Array, "1 N Q K"]:
        """Returns the bias for query positions from `first_query` and key positions from 0."""
        cfg = self.config
        table = param_with_axes(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (cfg.num_heads, cfg.relative_attention_num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        buckets = distance_buckets(
            keys,
            self.bidirectional,
            cfg.relative_attention_num_buckets,
            cfg.relative_attention_max_distance,
        )
        by_distance = jnp.asarray(table, jnp.float32)[:, buckets]
        start = keys - queries - first_query
        width = queries + keys - 1
        window = jax.lax.dynamic_slice_in_dim(by_distance, start, width, axis=1)
        return toeplitz(window, queries)[None]


class Dropout(nn.Module):
    """Dropout with one mask for all positions, as in T5."""

    config: T5Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        drop = nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))
        return drop(x, deterministic=self.deterministic)


class Mlp(nn.Module):
    """Feed-forward block, gated if there are two activations (Shazeer 2020)."""

    config: T5Config
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        cfg = self.config
        if self._uses_kernel(x.shape[1]):
            return self._by_kernel(x)
        names = [f"wi_{i}" for i in range(len(cfg.mlp_activations))]
        if len(names) == 1:
            names, activate = ["wi"], activated
        else:
            # The backward pass of a gate needs its inputs in any case, so only they are stored.
            activate = jax.checkpoint(activated, static_argnums=0)
        inner = [Dense(cfg.mlp_dim, ("embed", "mlp"), cfg, name=name)(x) for name in names]
        hidden = activate(cfg.mlp_activations, *inner)
        hidden = Dropout(cfg, self.deterministic)(hidden)
        hidden = constrain(hidden, "batch", "length", "mlp")
        return Dense(cfg.emb_dim, ("mlp", "embed"), cfg, name="wo")(hidden)

    def _uses_kernel(self, length: int) -> bool:
        """Whether the kernel of `fused_mlp` can be used for rows of this length.

        It must be enabled (by default, on TPUs that it makes faster), the block must be gated and
        without biases and updates, and every device must have the whole weights.
        """
        cfg = self.config
        faster = tpu_kernels.on_tpu(fused_mlp.BOUND_BY_MEMORY)
        enabled = faster if cfg.fused_mlp is None else cfg.fused_mlp
        return (
            enabled
            and len(cfg.mlp_activations) == 2
            and not cfg.biases
            and not is_updated(self)
            and tpu_kernels.shards_of("mlp") == 1
            and fused_mlp.fits(length, cfg.emb_dim, cfg.mlp_dim, jnp.dtype(cfg.dtype).itemsize)
        )

    def _by_kernel(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        cfg = self.config
        into, out = (cfg.emb_dim, cfg.mlp_dim), (cfg.mlp_dim, cfg.emb_dim)
        shapes = {"wi_0": into, "wi_1": into, "wo": out}
        axes = {into: ("embed", "mlp"), out: ("mlp", "embed")}
        matrices = tuple(
            Kernel(shape, axes[shape], cfg, _truncated_fan_in, name=name)()
            for name, shape in shapes.items()
        )
        kept = None
        if cfg.dropout_rate > 0 and not self.deterministic:
            ones = jnp.ones((x.shape[0], 1, cfg.mlp_dim), jnp.float32)
            kept = Dropout(cfg, self.deterministic)(ones)
        apply = lambda *arrays: fused_mlp.gated_mlp(  # noqa: E731
            *arrays, cfg.mlp_activations, not tpu_kernels.on_tpu()
        )
        rows = ("batch", None, None)
        arguments = (x, matrices, kept)
        whole = ((None, None),) * 3
        return tpu_kernels.over_mesh(
            apply, arguments, (rows, whole, None if kept is None else rows), rows
        )
