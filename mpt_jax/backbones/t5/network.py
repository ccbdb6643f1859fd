"""T5 encoder-decoder: embeddings and masks in, hidden states and logits out.

The network does not handle prompts. A caller that uses prompts embeds the tokens with `embed`,
inserts the prompt rows, and passes the embeddings and a mask to `encode`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.partitioning import ScanIn, scan_with_axes

from mpt_jax.backbones import layer_updates
from mpt_jax.backbones.t5 import layers
from mpt_jax.backbones.t5.attention import Attention
from mpt_jax.backbones.t5.config import T5Config
from mpt_jax.backbones.t5.scanned_params import LAYER_AXIS
from mpt_jax.core.shapes import Array, Bool, Float, Int
from mpt_jax.core.tree import flatten

Hidden = tuple[jax.Array, ...]


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a layer norm before and a residual connection.

    Returns a pair, as a scan over layers requires: the output, and the output again if `collect` is
    True, otherwise None.
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
    """Causal self-attention, cross-attention over the encoder output, and feed-forward.

    Returns the same pair as `EncoderLayer`. Uses the decoding cache if `cache_length` is given.
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
    """Runs the layers of one stack. Call it inside the stack's compact method.

    Args:
        layer: the layer class; a layer is called with `x` and `others` and returns
            `(x, collected)`.
        fields: the constructor arguments of the layer.
        config: the configuration, with the number of layers, `scan_layers` and `remat`.
        stack: the name of the stack and, as in T5X, of its scanned subtree.
        initializing: whether weights are being initialized.
        x: the input of the first layer.
        others: further inputs, which are the same for all layers.

    Returns:
        The output of the last layer, and the collected outputs of all layers in order; an empty
        tuple if layers do not collect them.
    """
    count = getattr(config, f"num_{stack}_layers")
    layer = rematerialized(layer, config)
    if not config.scan_layers:
        outputs = []
        for i in range(count):
            x, collected = layer(**fields, name=f"layers_{i}")(x, *others)
            outputs.append(collected)
        return x, tuple(kept for kept in outputs if kept is not None)
    # Weights are initialized with the layers on axis 1 and only read afterwards.
    axis = LAYER_AXIS if initializing else ScanIn(LAYER_AXIS)
    broadcast: Any = (nn.broadcast,) * len(others)
    scanned = scan_with_axes(
        layer,
        variable_axes={"params": axis, "cache": 0, layer_updates.COLLECTION: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=broadcast,
        length=count,
        axis_name="layers",
    )
    x, collected = scanned(**fields, name=stack)(x, *others)
    return x, () if collected is None else tuple(collected[i] for i in range(count))


def rematerialized(layer: type[nn.Module], config: T5Config) -> type[nn.Module]:
    """Returns a layer class whose backward pass recomputes activations as set by `config.remat`."""
    if config.remat == "none":
        return layer
    policy = None
    if config.remat == "minimal":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Inside a scan the compiler cannot merge the two computations anyway.
    return nn.remat(layer, policy=policy, prevent_cse=not config.scan_layers)


class Encoder(nn.Module):
    """The stack of encoder layers and the final norm."""

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
        ids = (segment_ids, segment_ids)
        others = (bias, pair_mask(mask, *ids), pair_segments(mask, *ids, length))
        embedded = layers.Dropout(cfg, deterministic)(x.astype(cfg.dtype))
        fields = {"config": cfg, "deterministic": deterministic, "collect": collect}
        x, inner = run_layers(
            EncoderLayer, fields, cfg, "encoder", self.is_initializing(), embedded, *others
        )
        x = layers.LayerNorm(cfg, name="encoder_norm")(x)
        # Unlike T5's other dropouts, this one has its own mask at every position.
        x = nn.Dropout(cfg.dropout_rate)(x, deterministic=deterministic)
        return x, (embedded, *inner[:-1], x)


class Decoder(nn.Module):
    """The stack of decoder layers and the final norm. It also holds the head's parameters, except a
    tied embedding; `Transformer.logits` uses them."""

    config: T5Config

    def setup(self) -> None:
        if not self.config.logits_via_embedding:
            self.logits_dense = layers.OutputProjection(self.config)
        if self.config.biases:
            self.logits_bias = layers.LogitsBias(self.config)

    @nn.compact
    def __call__(  # noqa: PLR0913 -- called only by Transformer
        self,
        y: Float[Array, "B L H"],
        encoded: Float[Array, "B T H"],
        encoder_mask: Bool[Array, "B T"],
        encoder_segment_ids: Int[Array, "B T"] | None,
        decoder_segment_ids: Int[Array, "B L"] | None,
        deterministic: bool,
        collect: bool,
        cache_length: int | None,
    ) -> tuple[Float[Array, "B L H"], Hidden]:
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
        return y, (embedded, *inner[:-1], y)

    def _causal(
        self, length: int, segment_ids: jax.Array | None, cache_length: int | None
    ) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
        """Returns the relative position bias, the causal mask and the cache index, for a whole
        sequence or for a step with a cache. The bias is None if layers have separate tables; the
        index is None if no cache is read."""
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
    """Returns whether each query may attend to each key. In packed rows, only keys of the same
    segment are allowed."""
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
    """Returns `pair_mask` as one number per query and one per key. A query may attend to the keys
    with the same number."""
    if query_segments is None or key_segments is None:
        return jnp.ones((key_mask.shape[0], queries), jnp.int32), key_mask.astype(jnp.int32)
    # Padding is segment 0. Its keys are masked, and its queries have no key to attend to.
    return query_segments, jnp.where(key_mask, key_segments, -1)


class Transformer(nn.Module):
    """T5 encoder-decoder. The collection `params` has the parameters in T5X's layout, and
    `params_axes` has their logical axes."""

    config: T5Config

    def setup(self) -> None:
        self.token_embedder = layers.Embed(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T H"]:
        """Returns the embeddings of tokens."""
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
        """Runs the encoder over tokens, or over embeddings that the caller computed.

        Args:
            inputs: the token ids `[B,T]` or the embeddings `[B,T,H]`.
            mask: True at positions that may be attended to.
            segment_ids: the example that each position belongs to, if rows are packed.
            deterministic: False draws dropout from the `dropout` random stream.
            return_hidden: whether to also return the hidden states: the embeddings, the output of
                every layer except the last, and the final output. There is one more state than
                there are layers.

        Returns:
            The final output `[B,T,H]`, or `(output, hidden states)`.
        """
        x = self.embed(inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
        encoded, hidden = self.encoder(x, mask, segment_ids, deterministic, return_hidden)
        return (encoded, hidden) if return_hidden else encoded

    def decode_states(  # noqa: PLR0913 -- all except three by keyword
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
    ) -> Float[Array, "B L H"] | tuple[Float[Array, "B L H"], Hidden]:
        """Runs the decoder over whole sequences, or step by step with a cache.

        With `decode=True` and `cache` mutable, a call without a cache creates one for
        `max_decode_length` positions and computes the keys and values of `encoded`. It returns
        the uncached result and does not store its tokens. Every further call appends its tokens
        and returns their states.

        Args:
            encoded: the result of `encode`.
            encoder_mask: the mask given to `encode`.
            decoder_input_tokens: the targets shifted right, or the new tokens of a decoding step.
            encoder_segment_ids: the example that each encoder position belongs to, if rows are
                packed.
            decoder_segment_ids: the example that each target belongs to, if rows are packed. A
                target attends only to its own example.
            deterministic: False draws dropout from the `dropout` random stream.
            decode: whether to use the cache.
            max_decode_length: the number of positions in the cache; required with `decode=True`.
            return_hidden: whether to also return the hidden states, as in `encode`.

        Returns:
            The final output `[B,L,H]`, from which `logits` computes logits, or `(output, hidden
            states)`.

        Raises:
            ValueError: `decode=True` with packed rows, or without `max_decode_length`.
        """
        if decode and max_decode_length is None:
            raise ValueError(
                "decode=True needs max_decode_length, the number of positions in the cache, which "
                "is None. Set it to the length of the longest output."
            )
        if decode and (encoder_segment_ids is not None or decoder_segment_ids is not None):
            raise ValueError(
                "Packed rows cannot be decoded, but segment ids were given. Convert the examples "
                "with pack=False, and omit the segment ids."
            )
        states, hidden = self.decoder(
            self.embed(decoder_input_tokens),
            encoded,
            encoder_mask,
            encoder_segment_ids,
            decoder_segment_ids,
            deterministic,
            return_hidden,
            max_decode_length if decode else None,
        )
        return (states, hidden) if return_hidden else states

    def logits(self, states: Float[Array, "B L H"]) -> Float[Array, "B L V"]:
        """Returns the logits of final decoder states, in float32."""
        tied = self.config.logits_via_embedding
        logits = self.token_embedder.attend(states) if tied else self.decoder.logits_dense(states)
        return self.decoder.logits_bias(logits) if self.config.biases else logits

    def decode(
        self,
        encoded: Float[Array, "B T H"],
        encoder_mask: Bool[Array, "B T"],
        decoder_input_tokens: Int[Array, "B L"],
        *,
        return_hidden: bool = False,
        **settings: Any,
    ) -> Float[Array, "B L V"] | tuple[Float[Array, "B L V"], Hidden]:
        """Returns the logits of `decode_states`, which has the same arguments, or `(logits, hidden
        states)`."""
        states: Any = self.decode_states(
            encoded, encoder_mask, decoder_input_tokens, return_hidden=return_hidden, **settings
        )
        return (self.logits(states[0]), states[1]) if return_hidden else self.logits(states)

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
        """Returns the logits of the targets given the inputs. See `encode` and `decode`."""
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
    """Returns the shape of every parameter by its path name, without creating arrays."""
    return dict(_parameter_shapes(config))


@functools.lru_cache(maxsize=64)  # tracing takes a second or more
def _parameter_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, mask, tokens)
    return {name: leaf.shape for name, leaf in flatten(variables["params"]).items()}
