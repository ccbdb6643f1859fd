"""Lanes beside a frozen image tower: class tokens that read summaries of the patches, one for each
task (MULTI-LANE).

The patches pass through the tower once, for all lanes. A lane's class token c attends, with the
frozen weights of each layer, to itself, to A summaries of the patches, and to keys and values of
the lane. Summary a is the mean of the normalized patches with the weights
`softmax(selector_a patches / sqrt(H))`. Selectors never read the image, so those of all layers are
computed once, for all images.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.backbones.clip import layers
from mpt_jax.backbones.clip.config import CLIPConfig
from mpt_jax.backbones.clip.token_merging import merge_tokens
from mpt_jax.backbones.t5.low_memory_ops import over_rows
from mpt_jax.backbones.t5.scanned_params import is_stacked, unstack_layers
from mpt_jax.core.shapes import Array, Float, Params


class LayerLanes(NamedTuple):
    """What lanes bring to one layer, for J lanes.

    Attributes:
        selectors: [J, A, H] after the layer norm; None if the layer makes no summaries.
        keys, values: [J, P, H]; None if the layer has none.
    """

    selectors: Float[Array, "J A H"] | None
    keys: Float[Array, "J P H"] | None
    values: Float[Array, "J P H"] | None


def layers_of(params: Params, config: CLIPConfig) -> list[Params]:
    """Returns the parameters of each layer of the image tower, stacked or not."""
    if is_stacked({"image_encoder": params}):
        params = unstack_layers({"image_encoder": params})["image_encoder"]
    return [params[f"layers_{i}"] for i in range(config.image.num_layers)]


def class_token(params: Params, config: CLIPConfig) -> Float[Array, "H"]:
    """Returns the class token without a position, as lanes start from it."""
    token = jnp.asarray(params["class_embedding"], jnp.float32)
    return _norm(config, params["input_norm"], token, jnp.float32) if config.input_norm else token


def selectors_of_layers(
    stack: list[Params], config: CLIPConfig, selectors: Float[Array, "... A H"]
) -> list[Float[Array, "... A H"]]:
    """Returns the selectors of every layer after its first layer norm.

    Args:
        stack: the parameters of the layers, see `layers_of`.
        config: the configuration of the backbone.
        selectors: those that enter the first layer.
    """
    x, found = selectors, []
    for params in stack:
        normed = _norm(config, params["pre_attention_layer_norm"], x)
        found.append(normed)
        # In place of an attention, the residual connection adds the normalized selectors.
        x = _feed_forward(config, params, x + normed)
    return found


def lane_features(
    params: Params,
    config: CLIPConfig,
    patches: tuple[Float[Array, "I H"], ...],
    lanes: list[LayerLanes],
    drop_and_replace: bool = True,
    merged_tokens: int = 0,
) -> Float[Array, "J U"]:
    """Returns the feature of one image in each of J lanes, float32, not normalized.

    Args:
        params: the parameters of the image tower.
        config: the configuration of the backbone.
        patches: the class token and the patches that enter each layer.
        lanes: what the lanes bring to each layer.
        drop_and_replace: whether every layer drops the summaries of the layer before. If False, the
            summaries of the first layer pass through all layers beside the class token.
        merged_tokens: if positive, summaries are the patches merged to this number, and lanes have
            no selectors.
    """
    x, _ = _run_layers(params, config, patches, lanes, drop_and_replace, merged_tokens)
    features = _norm(config, params["output_norm"], x[:, 0], jnp.float32)
    if config.joint_dim is not None:
        features = jnp.dot(features, jnp.asarray(params["projection"]["kernel"], jnp.float32))
    return features


def lane_attention(
    params: Params,
    config: CLIPConfig,
    patches: tuple[Float[Array, "I H"], ...],
    lanes: list[LayerLanes],
    drop_and_replace: bool = True,
) -> Float[Array, "J layers I"]:
    """Returns how far the class token of each lane attends to each token of one image, in each
    layer, through the summaries of its selectors.

    The value of token i is the sum over summaries a of two weights: that of summary a in the
    attention of the class token, as the mean over heads, and that of token i in summary a, the
    softmax over tokens of its selector. Token 0 is the image's own class token. The values of a
    layer sum to the attention on summaries; the rest of 1 is on the lane's class token and keys.

    Without `drop_and_replace`, layers after the first attend to summaries that earlier layers have
    changed. They count with the weights of the first layer, from which they descend.

    Arguments are those of `lane_features`. Every lane has selectors.
    """
    _, found = _run_layers(params, config, patches, lanes, drop_and_replace, 0)
    return jnp.stack(found, 1)


def _run_layers(
    params: Params,
    config: CLIPConfig,
    patches: tuple[Float[Array, "I H"], ...],
    lanes: list[LayerLanes],
    drop_and_replace: bool,
    merged_tokens: int,
) -> tuple[Float[Array, "J Q H"], list[Float[Array, "J I"]]]:
    """Returns the output of the last layer, whose first token is the class token, and the
    `lane_attention` of each layer; [] without selectors."""
    stack, count = layers_of(params, config), _count(lanes)
    x = jnp.tile(class_token(params, config), (count, 1, 1))
    weights, attention = None, []
    for i, (own, lane) in enumerate(zip(stack, lanes, strict=True)):
        norm = functools.partial(_norm, config, own["pre_attention_layer_norm"])
        keep = drop_and_replace or i == config.image.num_layers - 1
        normed = norm(x)
        summaries = None
        if merged_tokens and (drop_and_replace or not i):
            merged = merge_tokens(jax.lax.stop_gradient(norm(patches[i])[1:]), merged_tokens)
            summaries = jnp.tile(merged.astype(normed.dtype), (count, 1, 1))
        elif lane.selectors is not None:
            summaries, weights = _summaries(lane.selectors, norm(patches[i]))
        if summaries is not None:
            normed = jnp.concatenate([normed, summaries], 1)
            x = x if keep else jnp.concatenate([x, summaries], 1)
        queries = normed[:, : 1 if keep else None]
        output, attended = _attend(config, own["attention"], queries, normed, lane)
        if weights is not None:
            on_summaries = attended[:, :, 0, -weights.shape[1] :].mean(1)
            attention.append(jnp.einsum("ja,jai->ji", on_summaries, weights))
        x = x[:, : queries.shape[1]] + output
        x = _feed_forward(config, own, x)
    return x, attention


def _count(lanes: list[LayerLanes]) -> int:
    """Returns J; 1 if no layer has anything of a lane."""
    return next((len(x) for lane in lanes for x in lane if x is not None), 1)


def _summaries(
    selectors: Float[Array, "J A H"], patches: Float[Array, "I H"]
) -> tuple[Float[Array, "J A H"], Float[Array, "J A I"]]:
    """Returns the summaries, and the weight of each token in them."""
    patches = jax.lax.stop_gradient(patches)
    scores = jnp.einsum("jah,ih->jai", selectors, patches).astype(jnp.float32)
    weights = jax.nn.softmax(scores * selectors.shape[-1] ** -0.5)
    return jnp.einsum("jai,ih->jah", weights.astype(patches.dtype), patches), weights


def _attend(
    config: CLIPConfig,
    params: Params,
    queries: Float[Array, "J Q H"],
    tokens: Float[Array, "J M H"],
    lane: LayerLanes,
) -> tuple[Float[Array, "J Q H"], Float[Array, "J N Q K"]]:
    """Returns the output of a layer's attention at `queries`, over the keys and values of the lane
    and the tokens, and the weights of these, float32."""
    tower = config.image
    heads = lambda x: x.reshape(*x.shape[:-1], tower.num_heads, tower.head_dim)  # noqa: E731
    dense = lambda name, x: _dense(config, params[name], x)  # noqa: E731
    query = heads(dense("query", queries)) * tower.head_dim**-0.5
    key, value = heads(dense("key", tokens)), heads(dense("value", tokens))
    if lane.keys is not None and lane.values is not None:
        key = jnp.concatenate([heads(lane.keys).astype(key.dtype), key], 1)
        value = jnp.concatenate([heads(lane.values).astype(value.dtype), value], 1)
    scores = jnp.einsum("jqnd,jknd->jnqk", query, key).astype(jnp.float32)
    weights = jax.nn.softmax(scores)
    context = jnp.einsum("jnqk,jknd->jqnd", weights.astype(config.dtype), value)
    return dense("out", context.reshape(queries.shape)), weights


def _feed_forward(config: CLIPConfig, params: Params, x: Array) -> Array:
    normed = _norm(config, params["pre_mlp_layer_norm"], x)
    hidden = _dense(config, params["mlp"]["wi"], normed)
    return x + _dense(config, params["mlp"]["wo"], layers.activate(hidden, config))


def _norm(config: CLIPConfig, params: Params, x: Array, dtype: Any = None) -> Array:
    scale, bias = jnp.asarray(params["scale"]), jnp.asarray(params["bias"])
    return layers.layer_norm(
        x, scale, bias, config.layer_norm_epsilon, jnp.dtype(dtype or config.dtype)
    )


def _dense(config: CLIPConfig, params: Params, x: Array) -> Array:
    kernel, bias = (jnp.asarray(params[name], config.dtype) for name in ("kernel", "bias"))
    y = jnp.dot(x.astype(config.dtype), kernel)
    return y + over_rows(bias, y)
