"""The encoder-decoder: embeddings and masks in, logits and hidden states out.

The network never hears of prompts. A caller that wants some embeds the tokens itself (`embed`),
writes its rows in, and passes embeddings with a mask to `encode`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import ScanIn, scan_with_axes

from mpt_jax.backbones.t5 import layers
from mpt_jax.backbones.t5.attention import Attention
from mpt_jax.backbones.t5.config import T5Config
from mpt_jax.backbones.t5.scanned_params import LAYER_AXIS
from mpt_jax.core.shapes import Array, Bool, Float, Int
from mpt_jax.core.tree import flatten

Hidden = tuple[jax.Array, ...]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each normalized before and added to its input.

    Returns its output, and once more what a scan over layers shall collect.
    """

    config: T5Config
    deterministic: bool
    collect: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T H"],
        bias: Float[Array, "1 N T T"] | None,
        mask: Bool[Array, "B 1 #T T"],
        segments: tuple[Int[Array, "B T"], Int[Array, "B T"]],
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"] | None]:
        cfg, deterministic = self.config, self.deterministic
        if cfg.relative_bias_per_layer:
            relative = layers.RelativePositionBias(cfg, bidirectional=True, name="relpos_bias")
            bias = relative(x.shape[1], x.shape[1])
        normed = layers.LayerNorm(cfg, name="pre_attention_layer_norm")(x)
        y = Attention(cfg, deterministic, name="attention")(
            normed, normed, bias, mask, segments=segments
        )
        x = x + layers.Dropout(cfg, deterministic)(y)
        normed = layers.LayerNorm(cfg, name="pre_mlp_layer_norm")(x)
        y = layers.Mlp(cfg, deterministic, name="mlp")(normed)
        x = layers.constrain(x + layers.Dropout(cfg, deterministic)(y), "batch", "length", "embed")
        return x, (x if self.collect else None)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention over the encoder's output, feed-forward.

    Returns like `EncoderLayer`. With a `cache_length` it uses the cache.
    """

    config: T5Config
    deterministic: bool
    collect: bool
    cache_length: int | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L H"],
        encoded: Float[Array, "B T H"],
        bias: Float[Array, "1 N L M"] | None,
        self_mask: Bool[Array, "#B 1 L M"],
        cross_mask: Bool[Array, "B 1 #L T"],
        cross_segments: tuple[Int[Array, "B L"], Int[Array, "B T"]],
        cache_index: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B L H"], Float[Array, "B L H"] | None]:
        cfg, deterministic = self.config, self.deterministic
        self_cache, cross_cache = ("self", "cross") if self.cache_length else ("none", "none")
        if cfg.relative_bias_per_layer:
            relative = layers.RelativePositionBias(cfg, bidirectional=False, name="relpos_bias")
            first = 0 if cache_index is None else cache_index
            bias = relative(x.shape[1], self_mask.shape[-1], first)
        normed = layers.LayerNorm(cfg, name="pre_self_attention_layer_norm")(x)
        y = Attention(cfg, deterministic, self_cache, name="self_attention")(
            normed, normed, bias, self_mask, cache_index, self.cache_length
        )
        x = x + layers.Dropout(cfg, deterministic)(y)
        normed = layers.LayerNorm(cfg, name="pre_cross_attention_layer_norm")(x)
        y = Attention(cfg, deterministic, cross_cache, name="encoder_decoder_attention")(
            normed, encoded, None, cross_mask, segments=cross_segments
        )
        x = x + layers.Dropout(cfg, deterministic)(y)
        normed = layers.LayerNorm(cfg, name="pre_mlp_layer_norm")(x)
        y = layers.Mlp(cfg, deterministic, name="mlp")(normed)
        x = layers.constrain(x + layers.Dropout(cfg, deterministic)(y), "batch", "length", "embed")
        return x, (x if self.collect else None)


def run_layers(
    layer: type[nn.Module],
    fields: dict[str, Any],
    config: T5Config,
    stack: Literal["encoder", "decoder"],
    initializing: bool,
    x: Float[Array, "B T H"],
    *others: Any,
) -> tuple[Float[Array, "B T H"], Hidden]:
    """Runs the layers of one stack, inside the stack's compact method.

    Args:
        layer: the class of a layer; called with `x` and `others`, it returns `(x, collected)`.
        fields: what its constructor takes.
        config: says how many layers there are, whether to scan them and what to recompute.
        stack: names the scanned subtree, as T5X does.
        initializing: whether weights are being made.
        x: input of the first layer.
        others: further inputs, the same for all layers.

    Returns:
        the last layer's output, and what the layers collected, in order.
    """
    count = getattr(config, f"num_{stack}_layers")
    layer = rematerialized(layer, config)
    if not config.scan_layers:
        outputs = []
        for i in range(count):
            x, collected = layer(**fields, name=f"layers_{i}")(x, *others)
            outputs.append(collected)
        return x, tuple(kept for kept in outputs if kept is not None)
    # Weights are made with the layers on axis 1 and only read afterwards.
    axis = LAYER_AXIS if initializing else ScanIn(LAYER_AXIS)
    broadcast: Any = (nn.broadcast,) * len(others)
    scanned = scan_with_axes(
        layer,
        variable_axes={"params": axis, "cache": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=broadcast,
        length=count,
        axis_name="layers",
    )
    x, collected = scanned(**fields, name=stack)(x, *others)
    return x, () if collected is None else tuple(collected[i] for i in range(count))


def rematerialized(layer: type[nn.Module], config: T5Config) -> type[nn.Module]:
    """The layer, with the part of its activations that the backward pass recomputes."""
    if config.remat == "none":
        return layer
    policy = None
    if config.remat == "minimal":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Inside a scan the compiler cannot merge the two computations anyway.
    return nn.remat(layer, policy=policy, prevent_cse=not config.scan_layers)


class Encoder(nn.Module):
    """The stack of encoder layers and the norm after it."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T H"],
        mask: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        deterministic: bool,
        collect: bool,
    ) -> tuple[Float[Array, "B T H"], Hidden]:
        cfg, length = self.config, x.shape[1]
        bias = None
        if not cfg.relative_bias_per_layer:
            relative = layers.RelativePositionBias(cfg, bidirectional=True, name="relpos_bias")
            bias = relative(length, length)
        mine = (segment_ids, segment_ids)
        others = (bias, pair_mask(mask, *mine), pair_segments(mask, *mine, length))
        embedded = layers.Dropout(cfg, deterministic)(x.astype(cfg.dtype))
        fields = {"config": cfg, "deterministic": deterministic, "collect": collect}
        x, inner = run_layers(
            EncoderLayer, fields, cfg, "encoder", self.is_initializing(), embedded, *others
        )
        x = layers.LayerNorm(cfg, name="encoder_norm")(x)
        # Alone among T5's dropouts this one draws for every position.
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)
        return x, (embedded, *inner[:-1], x)


class Decoder(nn.Module):
    """The stack of decoder layers, the norm after it, and the logits."""

    config: T5Config

    @nn.compact
    def __call__(  # noqa: PLR0913 -- called by Transformer alone
        self,
        y: Float[Array, "B L H"],
        encoded: Float[Array, "B T H"],
        encoder_mask: Bool[Array, "B T"],
        encoder_segment_ids: Int[Array, "B T"] | None,
        decoder_segment_ids: Int[Array, "B L"] | None,
        deterministic: bool,
        collect: bool,
        cache_length: int | None,
        tied_logits: Callable[[jax.Array], jax.Array] | None,
    ) -> tuple[Float[Array, "B L V"], Hidden]:
        cfg = self.config
        bias, self_mask, cache_index = self._causal(y.shape[1], decoder_segment_ids, cache_length)
        ids = (decoder_segment_ids, encoder_segment_ids)
        cross_mask = pair_mask(encoder_mask, *ids)
        cross_segments = pair_segments(encoder_mask, *ids, y.shape[1])
        embedded = layers.Dropout(cfg, deterministic)(y.astype(cfg.dtype))
        fields = {"config": cfg, "deterministic": deterministic, "collect": collect}
        fields["cache_length"] = cache_length
        others = (encoded, bias, self_mask, cross_mask, cross_segments, cache_index)
        y, inner = run_layers(
            DecoderLayer, fields, cfg, "decoder", self.is_initializing(), embedded, *others
        )
        y = layers.LayerNorm(cfg, name="decoder_norm")(y)
        y = layers.Dropout(cfg, deterministic)(y)
        if tied_logits is not None:
            logits = tied_logits(y)
        else:
            logits = layers.OutputProjection(cfg, name="logits_dense")(y)
        return logits, (embedded, *inner[:-1], y)

    def _causal(
        self, length: int, segment_ids: jax.Array | None, cache_length: int | None
    ) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
        """Relative positions and causality, for a whole sequence or for a step with a cache; None
        for the former where layers have their own."""
        cfg = self.config
        index, keys = None, length
        if cache_length is not None:
            creating = not self.has_variable("cache", "cache_index")
            counter = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
            if not creating:
                index, keys = counter.value, cache_length
                counter.value = index + length
        first = 0 if index is None else index
        mask = (jnp.arange(keys)[None] <= (first + jnp.arange(length))[:, None])[None, None]
        if segment_ids is not None:
            mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        if cfg.relative_bias_per_layer:
            return None, mask, index
        relative = layers.RelativePositionBias(cfg, bidirectional=False, name="relpos_bias")
        return relative(length, keys, first), mask, index


def pair_mask(
    key_mask: Bool[Array, "B K"],
    query_segments: Int[Array, "B Q"] | None,
    key_segments: Int[Array, "B K"] | None,
) -> Bool[Array, "B 1 Q K"] | Bool[Array, "B 1 1 K"]:
    """Which keys a query may see: those of the mask, in its own segment where rows are packed."""
    mask = key_mask[:, None, :]
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
    return mask[:, None]


def pair_segments(
    key_mask: Bool[Array, "B K"],
    query_segments: Int[Array, "B Q"] | None,
    key_segments: Int[Array, "B K"] | None,
    queries: int,
) -> tuple[Int[Array, "B Q"], Int[Array, "B K"]]:
    """What `pair_mask` says, as a number for every query and every key: a query sees the keys
    that have its own."""
    if query_segments is None or key_segments is None:
        return jnp.ones((key_mask.shape[0], queries), jnp.int32), key_mask.astype(jnp.int32)
    # Padding is segment 0, and no key of it is seen. A query of it has no key to see.
    return query_segments, jnp.where(key_mask, key_segments, -1)


class Transformer(nn.Module):
    """T5. Parameters lie in `params` as T5X has them, their logical axes in `params_axes`."""

    config: T5Config

    def setup(self) -> None:
        self.token_embedder = layers.Embed(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T H"]:
        """The rows of the token table."""
        return self.token_embedder(tokens)

    def encode(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T H"],
        mask: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
        return_hidden: bool = False,
    ) -> Float[Array, "B T H"] | tuple[Float[Array, "B T H"], Hidden]:
        """Runs the encoder over tokens, or over embeddings where the caller has made them.

        Args:
            inputs: token ids `[B,T]` or embeddings `[B,T,H]`.
            mask: the positions that are attended to.
            segment_ids: which example a position belongs to, where rows are packed.
            deterministic: False draws dropout from the `dropout` random stream.
            return_hidden: also returns the hidden states: the embeddings, the output of every
                layer but the last, and the final output; one more than there are layers.

        Returns:
            encoded `[B,T,H]`, or `(encoded, hidden)`.
        """
        x = self.embed(inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
        encoded, hidden = self.encoder(x, mask, segment_ids, deterministic, return_hidden)
        return (encoded, hidden) if return_hidden else encoded

    def decode(  # noqa: PLR0913 -- T5X's arguments, all but three by keyword
        self,
        encoded: Float[Array, "B T H"],
        encoder_mask: Bool[Array, "B T"],
        decoder_input_tokens: Int[Array, "B L"],
        *,
        encoder_segment_ids: Int[Array, "B T"] | None = None,
        decoder_segment_ids: Int[Array, "B L"] | None = None,
        deterministic: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
        return_hidden: bool = False,
    ) -> Float[Array, "B L V"] | tuple[Float[Array, "B L V"], Hidden]:
        """Runs the decoder over whole sequences, or step by step with a cache.

        With `decode=True` and `cache` mutable, the call that finds no cache creates one for
        `max_decode_length` positions and computes the keys and values of `encoded`; what it
        returns is the uncached result and its tokens are not remembered. Every further call
        appends its tokens and returns their logits.

        Args:
            encoded: what `encode` returned.
            encoder_mask: the mask given to `encode`.
            decoder_input_tokens: targets shifted right; a step's new tokens when decoding.
            encoder_segment_ids: with `decoder_segment_ids`, where rows are packed.
            decoder_segment_ids: as above; a target sees the inputs of its own segment only.
            deterministic: False draws dropout from the `dropout` random stream.
            decode: whether to use the cache.
            max_decode_length: positions the cache holds; needed in every call that decodes.
            return_hidden: also returns the hidden states, counted as in `encode`.

        Returns:
            logits `[B,L,V]` in float32, or `(logits, hidden)`.

        Raises:
            ValueError: decoding packed rows, or without `max_decode_length`.
        """
        if decode and max_decode_length is None:
            raise ValueError("decode=True needs max_decode_length, the positions of the cache.")
        if decode and (encoder_segment_ids is not None or decoder_segment_ids is not None):
            raise ValueError("Packed rows (segment ids) cannot be decoded; pass pack=False.")
        tied = self.token_embedder.attend if self.config.logits_via_embedding else None
        logits, hidden = self.decoder(
            self.embed(decoder_input_tokens),
            encoded,
            encoder_mask,
            encoder_segment_ids,
            decoder_segment_ids,
            deterministic,
            return_hidden,
            max_decode_length if decode else None,
            tied,
        )
        return (logits, hidden) if return_hidden else logits

    def __call__(
        self,
        encoder_inputs: Int[Array, "B T"] | Float[Array, "B T H"],
        encoder_mask: Bool[Array, "B T"],
        decoder_input_tokens: Int[Array, "B L"],
        *,
        encoder_segment_ids: Int[Array, "B T"] | None = None,
        decoder_segment_ids: Int[Array, "B L"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B L V"]:
        """Logits of the targets given the inputs; see `encode` and `decode`."""
        encoded: Any = self.encode(
            encoder_inputs, encoder_mask, encoder_segment_ids, deterministic=deterministic
        )
        logits: Any = self.decode(
            encoded,
            encoder_mask,
            decoder_input_tokens,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            deterministic=deterministic,
        )
        return logits


def parameter_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Path name -> shape of every parameter, without making any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, mask, tokens)
    return {name: leaf.shape for name, leaf in flatten(variables["params"]).items()}
