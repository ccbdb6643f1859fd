"""Decoding with a cached decoder: greedy decoding, sampling with temperature, and beam search.

Each decoding function calls `tokens_to_logits(tokens [B*n,1], cache) -> (logits [B*n,V], cache)`,
with n hypotheses per example. Callers pass a cache of B rows, which the function repeats n times,
so n needs to be bound in gin only on the decoding function. The result is `(tokens [B,n,L], scores
[B,n])`, best first: tokens up to and including the end-of-sequence id, then zeros; scores are sums
of natural log probabilities (for beam search, divided by a length penalty). Shapes are static; the
loop stops early if further steps cannot change the result.

Cache leaves named `cached_*` are stored per hypothesis and are reordered together with the beams.
All other leaves (the position, the encoder's keys and values) are the same for all hypotheses of
an example and are not reordered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.core.shapes import Array, Float, Int, Key
from mpt_jax.core.tree import path_name

Cache = Any
TokensToLogits = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]
Decoded = tuple[Int[Array, "B n L"], Float[Array, "B n"]]

# Score of a hypothesis that does not exist; finite, so that sums with it stay comparable.
NOTHING = -1e7


def repeat_for_decodes(tree: Any, num_decodes: int, batch_axis: int = 0) -> Any:
    """Repeats every array of a tree n times along the batch, `[B,...] -> [B*n,...]`.

    Arrays without that axis (a cache's position) are unchanged. Caches of scanned layers have the
    batch on axis 1.
    """

    def repeat(x: jax.Array) -> jax.Array:
        return x if x.ndim <= batch_axis else jnp.repeat(x, num_decodes, axis=batch_axis)

    return jax.tree.map(repeat, tree)


def greedy(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    start: Int[Array, "B"],
    *,
    max_length: int,
    eos_id: int = 1,
) -> Decoded:
    """Decodes the most probable token at every position, n = 1.

    Args:
        tokens_to_logits: one step of the decoder.
        cache: the decoder's empty cache.
        start: the first input token of every example (0 for T5), which is not returned.
        max_length: L, the maximum number of positions to decode.
        eos_id: the token that ends a row.
    """

    def most_probable(logits: jax.Array, _: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    tokens, scores = _decode_rows(tokens_to_logits, cache, start, most_probable, max_length, eos_id)
    return tokens[:, None], scores[:, None]


def temperature_sample(  # noqa: PLR0913 -- the settings of sampling are this many
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    start: Int[Array, "B"],
    rng: Key,
    *,
    max_length: int,
    eos_id: int = 1,
    num_decodes: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cache_batch_axis: int = 0,
) -> Decoded:
    """Samples n sequences per example, sorted by their score.

    A score is the log probability under the model, without temperature and truncation, so samples
    drawn with different settings can be compared.

    Args:
        tokens_to_logits: one step of the decoder, over B*n rows.
        cache: the decoder's empty cache, B rows.
        start: the first input token of every example, which is not returned.
        rng: the random key of the draws.
        max_length: L, the maximum number of positions to decode.
        eos_id: the token that ends a row.
        num_decodes: the number n of samples per example.
        temperature: the divisor of the logits, above 0 (use `greedy` instead of 0).
        top_k: the number of most probable tokens to draw from; 0 means all.
        top_p: the probability mass of the nucleus to draw from, which is the smallest set of most
            probable tokens with at least this mass (Holtzman et al. 2020). 1 means all tokens.
        cache_batch_axis: the batch axis of the cache's leaves.

    Raises:
        ValueError: a setting is out of range.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature_sample.temperature must be above 0, got {temperature}. Use greedy "
            "decoding (decode_fn = @decoding.greedy) to always take the most probable token."
        )
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "temperature_sample.top_k must be at least 0 and temperature_sample.top_p in (0, 1], "
            f"got top_k = {top_k} and top_p = {top_p}. To sample from all tokens, set top_k = 0 "
            "and top_p = 1."
        )

    def draw(logits: jax.Array, step: jax.Array) -> jax.Array:
        logits = keep_most_probable(logits / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(rng, step), logits)

    cache = repeat_for_decodes(cache, num_decodes, cache_batch_axis)
    rows = jnp.repeat(start, num_decodes)
    tokens, scores = _decode_rows(tokens_to_logits, cache, rows, draw, max_length, eos_id)
    tokens = tokens.reshape(start.shape[0], num_decodes, max_length)
    return _best_first(tokens, scores.reshape(start.shape[0], num_decodes))


def keep_most_probable(
    logits: Float[Array, "B V"], top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "B V"]:
    """Keeps the k largest logits, or the nucleus of mass p, and sets all others to minus infinity.

    With both settings, the nucleus is computed from the logits that `top_k` keeps. Logits that
    equal the smallest one kept are also kept.
    """
    if top_k:
        edge = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < edge, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        # A token is in the nucleus if the tokens before it have less than the mass.
        inside = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        edge = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < edge, -jnp.inf, logits)
    return logits


def _decode_rows(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    start: jax.Array,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    max_length: int,
    eos_id: int,
) -> tuple[jax.Array, jax.Array]:
    """Decodes each row independently and returns tokens `[rows,L]` and scores `[rows]`."""
    rows = start.shape[0]

    def running(state: tuple) -> jax.Array:
        step, _, _, _, ended, _ = state
        return (step < max_length) & ~jnp.all(ended)

    def advance(state: tuple) -> tuple:
        step, last, tokens, scores, ended, cache = state
        logits, cache = tokens_to_logits(last[:, None], cache)
        logits = logits.astype(jnp.float32)
        token = choose(logits, step).astype(tokens.dtype)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        token = jnp.where(ended, 0, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        scores = scores + jnp.where(ended, 0.0, log_prob)
        return step + 1, token, tokens, scores, ended | (token == eos_id), cache

    state = (
        jnp.zeros((), jnp.int32),
        start.astype(jnp.int32),
        jnp.zeros((rows, max_length), jnp.int32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows,), bool),
        cache,
    )
    _, _, tokens, scores, _, _ = jax.lax.while_loop(running, advance, state)
    return tokens, scores


class _Beams(NamedTuple):
    """State of a beam search: n open and n ended hypotheses per example, each best first."""

    step: jax.Array
    last: jax.Array  # [B,n] newest token of the open hypotheses
    open_tokens: jax.Array  # [B,n,L]
    open_scores: jax.Array  # [B,n] log probability
    ended_tokens: jax.Array  # [B,n,L]
    ended_scores: jax.Array  # [B,n] log probability over length penalty
    cache: Cache


def beam_search(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    start: Int[Array, "B"],
    *,
    max_length: int,
    eos_id: int = 1,
    num_decodes: int = 4,
    alpha: float = 0.6,
    cache_batch_axis: int = 0,
) -> Decoded:
    """Returns the n best sequences found by a beam search of width n.

    A score is the log probability divided by `((5 + length) / 6)^alpha` (Wu et al. 2016,
    section 7). Ended hypotheses come first; if fewer than n ended within `max_length`, the best
    open ones follow.

    Args:
        tokens_to_logits: one step of the decoder, over B*n rows.
        cache: the decoder's empty cache, B rows.
        start: the first input token of every example, which is not returned.
        max_length: L, the maximum number of positions to decode.
        eos_id: the token that ends a row.
        num_decodes: the width n of the beam.
        alpha: the strength of the length penalty; 0 ranks by log probability only.
        cache_batch_axis: the batch axis of the cache's leaves.

    Raises:
        ValueError: alpha is negative, which would make early stopping incorrect.
    """
    if alpha < 0:
        raise ValueError(
            f"beam_search.alpha must be at least 0, got {alpha}. Use 0 for no length penalty."
        )
    batch, n = start.shape[0], num_decodes
    first = jnp.where(jnp.arange(n) == 0, 0.0, NOTHING)  # n equal hypotheses would stay equal
    beams = _Beams(
        step=jnp.zeros((), jnp.int32),
        last=jnp.broadcast_to(start.astype(jnp.int32)[:, None], (batch, n)),
        open_tokens=jnp.zeros((batch, n, max_length), jnp.int32),
        open_scores=jnp.broadcast_to(first, (batch, n)),
        ended_tokens=jnp.zeros((batch, n, max_length), jnp.int32),
        ended_scores=jnp.full((batch, n), NOTHING),
        cache=repeat_for_decodes(cache, n, cache_batch_axis),
    )

    def running(beams: _Beams) -> jax.Array:
        # Log probabilities are negative, so no open hypothesis can end with a score above this.
        bound = beams.open_scores[:, 0] / _length_penalty(max_length, alpha)
        settled = jnp.all(beams.ended_scores[:, -1] >= bound)
        return (beams.step < max_length) & ~settled

    def advance(beams: _Beams) -> _Beams:
        logits, cache = tokens_to_logits(beams.last.reshape(-1, 1), beams.cache)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, n, -1)
        return _extend(beams, log_probs, cache, eos_id, alpha, cache_batch_axis)

    beams = jax.lax.while_loop(running, advance, beams)
    has_ended = beams.ended_scores > NOTHING / 2
    unfinished = beams.open_scores / _length_penalty(beams.step, alpha)
    rank = jnp.concatenate([jnp.where(has_ended, 1, -1), jnp.zeros((batch, n), jnp.int32)], axis=1)
    scores = jnp.concatenate([beams.ended_scores, unfinished], axis=1)
    tokens = jnp.concatenate([beams.ended_tokens, beams.open_tokens], axis=1)
    order = jnp.lexsort((-scores, -rank), axis=1)[:, :n]
    return _take_beams(tokens, order), _take_beams(scores, order)


def _extend(
    beams: _Beams, log_probs: jax.Array, cache: Cache, eos_id: int, alpha: float, batch_axis: int
) -> _Beams:
    """Extends every open hypothesis by every token and keeps the n best open and n best ended."""
    batch, n, vocabulary = log_probs.shape
    scores = (beams.open_scores[:, :, None] + log_probs).reshape(batch, n * vocabulary)
    # At most n of the best 2n can end here, so at least n remain open.
    scores, index = jax.lax.top_k(scores, 2 * n)
    parent, last = index // vocabulary, index % vocabulary
    tokens = jax.lax.dynamic_update_slice_in_dim(
        _take_beams(beams.open_tokens, parent), last[:, :, None], beams.step, axis=2
    )
    ends = (last == eos_id) & (scores > NOTHING / 2)
    penalized = scores / _length_penalty(beams.step + 1, alpha)
    ended_scores, order = jax.lax.top_k(
        jnp.concatenate([beams.ended_scores, jnp.where(ends, penalized, NOTHING)], axis=1), n
    )
    ended_tokens = _take_beams(jnp.concatenate([beams.ended_tokens, tokens], axis=1), order)
    open_scores, order = jax.lax.top_k(jnp.where(ends, NOTHING, scores), n)
    return _Beams(
        step=beams.step + 1,
        last=_take_beams(last, order),
        open_tokens=_take_beams(tokens, order),
        open_scores=open_scores,
        ended_tokens=ended_tokens,
        ended_scores=ended_scores,
        cache=_reorder_cache(cache, _take_beams(parent, order), batch_axis),
    )


def _length_penalty(length: jax.Array | int, alpha: float) -> jax.Array:
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def _take_beams(x: jax.Array, beams: jax.Array) -> jax.Array:
    """Returns `x[b, beams[b, i]]` for `x [B,m,...]` and `beams [B,n]`."""
    index = beams.reshape(beams.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _reorder_cache(cache: Cache, parents: Int[Array, "B n"], batch_axis: int) -> Cache:
    """Copies the per-hypothesis rows of a cache from each parent to its continuations."""
    batch, n = parents.shape
    rows = (jnp.arange(batch)[:, None] * n + parents).reshape(-1)

    def reorder(path: tuple, leaf: jax.Array) -> jax.Array:
        is_per_hypothesis = path_name(path).rpartition("/")[2].startswith("cached_")
        return jnp.take(leaf, rows, axis=batch_axis) if is_per_hypothesis else leaf

    return jax.tree_util.tree_map_with_path(reorder, cache)


def _best_first(tokens: jax.Array, scores: jax.Array) -> Decoded:
    order = jnp.argsort(-scores, axis=1)
    return _take_beams(tokens, order), _take_beams(scores, order)
