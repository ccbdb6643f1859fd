"""Tests of every decoder against a slow float64 reference on a small recurrent model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.models import decoding
from tests.fixtures.reference_decoding import EOS, cut, slow_beam

VOCABULARY, STATE = 5, 6


class TinyModel:
    """`state' = tanh(A state + E[token])`, `logits = 3 W state' + bias of the example`."""

    def __init__(self, batch: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.batch = batch
        self.recurrence = rng.normal(size=(STATE, STATE)) / STATE**0.5
        self.embedding = rng.normal(size=(VOCABULARY, STATE))
        self.output = rng.normal(size=(STATE, VOCABULARY))
        self.bias = rng.normal(size=(batch, VOCABULARY))

    def cache(self) -> dict:
        return {
            "cached_state": jnp.zeros((self.batch, STATE)),
            "memory_bias": jnp.asarray(self.bias, jnp.float32),
            "cache_index": jnp.zeros((), jnp.int32),
        }

    def tokens_to_logits(self, tokens, cache):
        state = jnp.tanh(
            cache["cached_state"] @ self.recurrence.astype(np.float32)
            + jnp.asarray(self.embedding, jnp.float32)[tokens[:, 0]]
        )
        logits = 3 * state @ self.output.astype(np.float32) + cache["memory_bias"]
        index = cache["cache_index"] + 1
        return logits, {**cache, "cached_state": state, "cache_index": index}

    def log_probabilities(self, example: int, prefix: tuple[int, ...]) -> np.ndarray:
        """Returns the log probabilities of the token that follows `0, *prefix`."""
        state = np.zeros(STATE)
        for token in (0, *prefix):
            state = np.tanh(state @ self.recurrence + self.embedding[token])
        logits = 3 * state @ self.output + self.bias[example]
        return logits - np.log(np.exp(logits).sum())

    def score(self, example: int, tokens: tuple[int, ...]) -> float:
        return sum(
            self.log_probabilities(example, tokens[:i])[token] for i, token in enumerate(tokens)
        )


def starts(model: TinyModel) -> jax.Array:
    return jnp.zeros((model.batch,), jnp.int32)


def slow_greedy(model: TinyModel, example: int, length: int) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    while len(tokens) < length and EOS not in tokens:
        tokens += (int(np.argmax(model.log_probabilities(example, tokens))),)
    return tokens


@pytest.mark.parametrize("seed", range(4))
def test_greedy_takes_most_probable_tokens_until_eos(seed):
    model = TinyModel(batch=6, seed=seed)
    tokens, scores = decoding.greedy(
        model.tokens_to_logits, model.cache(), starts(model), max_length=7, eos_id=EOS
    )
    assert tokens.shape == (6, 1, 7) and scores.shape == (6, 1)
    for example in range(6):
        expected = slow_greedy(model, example, 7)
        assert cut(tokens[example, 0]) == expected
        np.testing.assert_allclose(scores[example, 0], model.score(example, expected), atol=1e-4)


def test_greedy_all_rows_ended_stops():
    def ends_at_once(tokens, cache):
        logits = jax.nn.one_hot(jnp.full(tokens.shape[0], EOS), VOCABULARY)
        return logits, jax.tree.map(lambda count: count + 1, cache)

    steps = []

    def spy(tokens, cache):
        jax.debug.callback(lambda: steps.append(1))
        return ends_at_once(tokens, cache)

    decoding.greedy(spy, {"count": jnp.zeros(())}, jnp.zeros(3, jnp.int32), max_length=9)
    jax.effects_barrier()
    assert len(steps) == 1


def test_temperature_sample_single_candidate_equals_greedy():
    model = TinyModel(batch=5)
    arguments = (model.tokens_to_logits, model.cache(), starts(model))
    expected, _ = decoding.greedy(*arguments, max_length=6)
    rng = jax.random.key(0)
    for setting in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        tokens, _ = decoding.temperature_sample(*arguments, rng, max_length=6, **setting)
        np.testing.assert_array_equal(tokens, expected)


def test_temperature_sample_sorts_by_model_log_probability():
    model = TinyModel(batch=3)
    tokens, scores = decoding.temperature_sample(
        model.tokens_to_logits,
        model.cache(),
        starts(model),
        jax.random.key(1),
        max_length=5,
        num_decodes=4,
        temperature=0.7,
        top_k=3,
    )
    assert tokens.shape == (3, 4, 5)
    for example, n in itertools.product(range(3), range(4)):
        expected = model.score(example, cut(tokens[example, n]))
        np.testing.assert_allclose(scores[example, n], expected, atol=1e-4)
    assert np.all(np.diff(scores, axis=1) <= 0)
    assert len({cut(tokens[e, n]) for e in range(3) for n in range(4)}) > 3  # not all the same


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sample_follows_tempered_distribution(temperature):
    model, n = TinyModel(batch=1), 20_000
    tokens, _ = decoding.temperature_sample(
        model.tokens_to_logits,
        model.cache(),
        starts(model),
        jax.random.key(2),
        max_length=1,
        num_decodes=n,
        temperature=temperature,
    )
    found = np.bincount(np.asarray(tokens).ravel(), minlength=VOCABULARY) / n
    expected = np.exp(model.log_probabilities(0, ()) / temperature)
    expected /= expected.sum()
    # Five standard deviations of a frequency; the seed is fixed, so this cannot flicker.
    np.testing.assert_array_less(np.abs(found - expected), 5 * np.sqrt(0.25 / n))


def slow_nucleus(logits: np.ndarray, k: int, p: float) -> set[int]:
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: k or None]
    weights = np.exp(logits[order])
    weights /= weights.sum()
    kept, mass = set(), 0.0
    for index, weight in zip(order, weights, strict=True):
        if mass >= p:
            break
        kept.add(index)
        mass += weight
    return kept


@pytest.mark.parametrize(("k", "p"), [(0, 1.0), (1, 1.0), (3, 1.0), (99, 1.0), (0, 0.5), (4, 0.8)])
def test_keep_most_probable_keeps_nucleus(k, p):
    logits = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32) * 2
    kept = np.isfinite(decoding.keep_most_probable(jnp.asarray(logits), k, p))
    for row in range(8):
        assert set(np.flatnonzero(kept[row])) == slow_nucleus(logits[row], k, p)


def test_decoding_settings_out_of_range_raise():
    model = TinyModel(batch=1)
    arguments = (model.tokens_to_logits, model.cache(), starts(model), jax.random.key(0))
    with pytest.raises(ValueError, match="Use greedy"):
        decoding.temperature_sample(*arguments, max_length=2, temperature=0.0)
    with pytest.raises(ValueError, match="top_p"):
        decoding.temperature_sample(*arguments, max_length=2, top_p=0.0)
    with pytest.raises(ValueError, match="alpha"):
        decoding.beam_search(*arguments[:3], max_length=2, alpha=-1.0)


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.6), (2, 0.0), (3, 0.6), (4, 1.0)])
def test_beam_search_equals_slow_reference(n, alpha):
    model = TinyModel(batch=4, seed=n)
    tokens, scores = decoding.beam_search(
        model.tokens_to_logits,
        model.cache(),
        starts(model),
        max_length=6,
        eos_id=EOS,
        num_decodes=n,
        alpha=alpha,
    )
    for example in range(4):
        expected = slow_beam(model, example, n, 6, alpha)
        assert [cut(row) for row in tokens[example]] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose(scores[example], [score for _, score in expected], atol=1e-4)


def test_beam_search_exhaustive_width_finds_best_sequence():
    model, length, n = TinyModel(batch=2, seed=9), 3, VOCABULARY**2
    tokens, scores = decoding.beam_search(
        model.tokens_to_logits,
        model.cache(),
        starts(model),
        max_length=length,
        num_decodes=n,
        alpha=0.0,
    )
    everything = [
        sequence
        for size in range(1, length + 1)
        for sequence in itertools.product(range(VOCABULARY), repeat=size)
        if sequence[-1] == EOS and EOS not in sequence[:-1]
    ]
    for example in range(2):
        best = max(everything, key=lambda sequence: model.score(example, sequence))
        assert cut(tokens[example, 0]) == best
        np.testing.assert_allclose(scores[example, 0], model.score(example, best), atol=1e-4)


@pytest.mark.parametrize("decode", ["beam_search", "temperature_sample"])
def test_decoding_scanned_cache_uses_its_batch_axis(decode):
    model, n = TinyModel(batch=3, seed=5), 3
    inner = ("cached_state", "memory_bias")

    def on_axis_1(tokens, cache):
        logits, cache = model.tokens_to_logits(
            tokens, {**cache, **{name: cache[name][0] for name in inner}}
        )
        return logits, {**cache, **{name: cache[name][None] for name in inner}}

    plain = model.cache()
    stacked = {**plain, **{name: plain[name][None] for name in inner}}
    settings = {"max_length": 6, "num_decodes": n}
    if decode == "temperature_sample":
        settings["rng"] = jax.random.key(3)
    run = getattr(decoding, decode)
    expected = run(model.tokens_to_logits, plain, starts(model), **settings)
    found = run(on_axis_1, stacked, starts(model), cache_batch_axis=1, **settings)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
