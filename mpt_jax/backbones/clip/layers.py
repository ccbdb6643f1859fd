"""Parts of a CLIP layer, and the pre-norm layer that both towers are built from.

Parameters are initialized as OpenAI's CLIP is for training from scratch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import ScanIn, param_with_axes, scan_with_axes

from mpt_jax.backbones.clip.config import CLIPConfig, TowerConfig
from mpt_jax.backbones.t5.layers import Initializer, constrain
from mpt_jax.backbones.t5.low_memory_ops import masked_softmax, over_rows
from mpt_jax.backbones.t5.scanned_params import LAYER_AXIS
from mpt_jax.core.shapes import Array, Bool, Float

Hidden = tuple[jax.Array, ...]
_QUICK = 1.702


class Dense(nn.Module):
    """`x W`, plus a bias if `use_bias` is True."""

    features: int
    axes: tuple[str, str]
    dtype: Any
    kernel_init: Initializer
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        shape = (x.shape[-1], self.features)
        kernel = param_with_axes("kernel", self.kernel_init, shape, jnp.float32, axes=self.axes)
        y = jnp.dot(x.astype(self.dtype), jnp.asarray(kernel, self.dtype))
        if not self.use_bias:
            return y
        zeros = nn.initializers.zeros
        bias = param_with_axes("bias", zeros, shape[1:], jnp.float32, axes=self.axes[1:])
        return y + over_rows(jnp.asarray(bias, self.dtype), y)


class Projection(nn.Module):
    """Projection of features to the joint width, in float32."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H"]) -> Float[Array, "B U"]:
        shape = (x.shape[-1], self.config.joint_dim)
        init = nn.initializers.normal(x.shape[-1] ** -0.5)
        kernel = param_with_axes("kernel", init, shape, jnp.float32, axes=("embed", "joint"))
        return jnp.dot(x, jnp.asarray(kernel, jnp.float32))


class Table(nn.Module):
    """An embedding table."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    std: float

    @nn.compact
    def __call__(self) -> Float[Array, "rows H"]:
        init = nn.initializers.normal(self.std)
        table = param_with_axes("embedding", init, self.shape, jnp.float32, axes=self.axes)
        return jnp.asarray(table)


class LayerNorm(nn.Module):
    """Layer norm with a bias, computed in float32 and returned in `dtype`."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*rows H"]) -> Float[Array, "*rows H"]:
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        scale = param_with_axes("scale", ones, shape, jnp.float32, axes=("embed",))
        bias = param_with_axes("bias", zeros, shape, jnp.float32, axes=("embed",))
        dtype = jnp.dtype(self.dtype)
        return layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), self.epsilon, dtype)


def layer_norm(
    x: Float[Array, "*rows H"],
    scale: Float[Array, "H"],
    bias: Float[Array, "H"],
    epsilon: float,
    dtype: jnp.dtype,
) -> Float[Array, "*rows H"]:
    """Returns `(x - mean) / std * scale + bias` in `dtype`, computed in float32.

    Stores `x`, which the residual connection stores anyway, and two values per row for the
    backward pass. Supports reverse mode only.
    """
    y: jax.Array = _norm(x, scale, bias, epsilon, dtype)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm(x, scale, bias, epsilon, dtype) -> Any:
    return _norm_forward(x, scale, bias, epsilon, dtype)[0]


def _norm_forward(x, scale, bias, epsilon, dtype):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centered = wide - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + epsilon)
    y = centered * inverse * over_rows(scale.astype(jnp.float32), x)
    y = y + over_rows(bias.astype(jnp.float32), x)
    return y.astype(dtype), (x, mean, inverse, scale, bias)


def _norm_backward(epsilon, dtype, kept, slope):
    x, mean, inverse, scale, bias = kept
    slope = slope.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    scale_slope = jnp.sum(slope * normed, axis=rows).astype(scale.dtype)
    bias_slope = jnp.sum(slope, axis=rows).astype(bias.dtype)
    slope = slope * over_rows(scale.astype(jnp.float32), x)
    along = normed * jnp.mean(slope * normed, axis=-1, keepdims=True)
    slope = inverse * (slope - jnp.mean(slope, axis=-1, keepdims=True) - along)
    return slope.astype(x.dtype), scale_slope, bias_slope


_norm.defvjp(_norm_forward, _norm_backward)


class Attention(nn.Module):
    """Multi-head self-attention. Scores are scaled by D^-0.5."""

    config: CLIPConfig
    tower: TowerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T H"], mask: Bool[Array, "1 1 #T T"]
    ) -> Float[Array, "B T H"]:
        cfg, tower = self.config, self.tower
        into = nn.initializers.normal(tower.emb_dim**-0.5)

        def heads(name: str) -> Float[Array, "B T N D"]:
            axes = ("embed", "joined_kv")
            y = Dense(tower.emb_dim, axes, cfg.dtype, into, name=name)(x)
            y = y.reshape(*y.shape[:2], tower.num_heads, tower.head_dim)
            return constrain(y, "batch", "length", "heads", "kv")

        query, key, value = heads("query") * tower.head_dim**-0.5, heads("key"), heads("value")
        scores = jnp.einsum("bqnd,bknd->bnqk", query, key).astype(jnp.float32)
        probabilities = masked_softmax(scores, None, mask, cfg.dtype)
        context = jnp.einsum("bnqk,bknd->bqnd", probabilities, value).reshape(x.shape)
        axes = ("joined_kv", "embed")
        return Dense(tower.emb_dim, axes, cfg.dtype, _into_residual(tower), name="out")(context)


class Mlp(nn.Module):
    """Feed-forward block."""

    config: CLIPConfig
    tower: TowerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        cfg, tower = self.config, self.tower
        into = nn.initializers.normal((2 * tower.emb_dim) ** -0.5)
        hidden = Dense(tower.mlp_dim, ("embed", "mlp"), cfg.dtype, into, name="wi")(x)
        # The backward pass needs the input in any case, so only it is stored.
        hidden = jax.checkpoint(_ACTIVATIONS[cfg.activation])(hidden)
        hidden = constrain(hidden, "batch", "length", "mlp")
        init = _into_residual(tower)
        return Dense(tower.emb_dim, ("mlp", "embed"), cfg.dtype, init, name="wo")(hidden)


def _into_residual(tower: TowerConfig) -> Initializer:
    """Returns the initializer of kernels whose output is added to the residual stream."""
    return nn.initializers.normal((2 * tower.emb_dim * tower.num_layers) ** -0.5)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(_QUICK * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def activate(x: Array, config: CLIPConfig) -> Array:
    """Returns the feed-forward activation of the configuration at `x`."""
    return _ACTIVATIONS[config.activation](x)


class Layer(nn.Module):
    """Self-attention and feed-forward, each with a layer norm before and a residual connection.

    If `prompts` is given, it replaces positions 1 to P of the input. Returns a pair, as a scan over
    layers requires: the output, and the output again if `collect` is True, otherwise None.
    """

    config: CLIPConfig
    tower: TowerConfig
    collect: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T H"],
        prompts: Float[Array, "#B P H"] | None,
        mask: Bool[Array, "1 1 #T T"],
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"] | None]:
        cfg = self.config
        if prompts is not None:
            x = insert(x[:, :1], prompts, x[:, 1 + prompts.shape[1] :])
        norm = functools.partial(LayerNorm, cfg.layer_norm_epsilon, cfg.dtype)
        normed = norm(name="pre_attention_layer_norm")(x)
        x = x + Attention(cfg, self.tower, name="attention")(normed, mask)
        normed = norm(name="pre_mlp_layer_norm")(x)
        x = x + Mlp(cfg, self.tower, name="mlp")(normed)
        x = constrain(x, "batch", "length", "embed")
        return x, (x if self.collect else None)


def insert(
    first: Float[Array, "B 1 H"], prompts: Float[Array, "#B P H"], rest: Float[Array, "B I H"]
) -> Float[Array, "B T H"]:
    """Returns the sequence of the class token, the prompts and the remaining tokens."""
    shape = (first.shape[0], *prompts.shape[1:])
    return jnp.concatenate([first, jnp.broadcast_to(prompts.astype(first.dtype), shape), rest], 1)


def run_layers(
    config: CLIPConfig,
    tower: TowerConfig,
    stack: str,
    initializing: bool,
    collect: bool,
    x: Float[Array, "B T H"],
    prompts: Float[Array, "Y some P H"] | None,
    mask: Bool[Array, "1 1 #T T"],
) -> tuple[Float[Array, "B T H"], Hidden]:
    """Runs the layers of a tower. Call it inside the tower's compact method.

    Args:
        config: the configuration, with `scan_layers` and `remat`.
        tower: the sizes of the tower.
        stack: the name of the tower and of its scanned subtree.
        initializing: whether weights are being initialized.
        collect: whether to return the hidden states.
        x: the input of the first layer.
        prompts: for each layer, the prompt that replaces positions 1 to P of its input; or None.
        mask: whether a query may attend to a key.

    Returns:
        The output of the last layer, and the hidden states: the input of the first layer and the
        output of every layer. They are an empty tuple if `collect` is False.
    """
    layer, inputs = rematerialized(Layer, config), x
    fields: dict[str, Any] = {"config": config, "tower": tower, "collect": collect}
    if config.scan_layers:
        axes: Any = (nn.broadcast if prompts is None else 0, nn.broadcast)
        scanned = scan_with_axes(
            layer,
            # Weights are initialized with the layers on axis 1 and only read afterwards.
            variable_axes={"params": LAYER_AXIS if initializing else ScanIn(LAYER_AXIS)},
            split_rngs={"params": True},
            in_axes=axes,
            length=tower.num_layers,
            axis_name="layers",
        )
        x, outputs = scanned(**fields, name=stack)(x, prompts, mask)
        outputs = () if outputs is None else tuple(outputs[i] for i in range(tower.num_layers))
    else:
        outputs = []
        for i in range(tower.num_layers):
            own = None if prompts is None else prompts[i]
            x, output = layer(**fields, name=f"layers_{i}")(x, own, mask)
            outputs.append(output)
    return x, ((inputs, *outputs) if collect else ())


def rematerialized(layer: type[nn.Module], config: CLIPConfig) -> type[nn.Module]:
    """Returns a layer class whose backward pass recomputes activations as set by `config.remat`."""
    if config.remat == "none":
        return layer
    policy = None
    if config.remat == "minimal":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Inside a scan the compiler cannot merge the two computations anyway.
    return nn.remat(layer, policy=policy, prevent_cse=not config.scan_layers)
