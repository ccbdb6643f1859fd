"""Single layers against plain loops and textbook formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5 import T5Config, layers
from mpt_jax.backbones.t5.attention import Attention
from mpt_jax.backbones.t5.low_memory_ops import masked_softmax, rms_norm


def slow_bucket(distance: int, bidirectional: bool, buckets: int, farthest: int) -> int:
    """The T5 paper's rule in integers and exact logarithms, for one key - query distance."""
    row = 0
    if bidirectional:
        buckets //= 2
        row = buckets if distance > 0 else 0
        behind = abs(distance)
    else:
        behind = max(-distance, 0)
    exact = buckets // 2
    if behind < exact:
        return row + behind
    grown = exact + math.floor(
        math.log(behind / exact) / math.log(farthest / exact) * (buckets - exact) + 1e-9
    )
    return row + min(grown, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20)])
def test_distance_buckets_match_t5_paper(bidirectional, buckets, farthest):
    found = layers.distance_buckets(200, bidirectional, buckets, farthest)
    expected = [slow_bucket(d, bidirectional, buckets, farthest) for d in range(-199, 200)]
    np.testing.assert_array_equal(found, expected)
    assert set(found) <= set(range(buckets))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (1, 6), (3, 7), (5, 2)])
def test_toeplitz_repeats_values_along_diagonals(rows, columns):
    values = np.random.default_rng(0).normal(size=(2, rows + columns - 1)).astype(np.float32)
    found = layers.toeplitz(jnp.asarray(values), rows)
    expected = [[values[:, k - q + rows - 1] for k in range(columns)] for q in range(rows)]
    np.testing.assert_array_equal(found, np.transpose(expected, (2, 0, 1)))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_bias_matches_table_lookup(bidirectional):
    config = T5Config(vocab_size=4, num_heads=3)
    module = layers.RelativePositionBias(config, bidirectional)
    variables = module.init(jax.random.key(0), 9, 9)
    table = variables["params"]["rel_embedding"]
    whole = module.apply(variables, 9, 9)
    assert whole.shape == (1, 3, 9, 9)
    for q in range(9):
        for k in range(9):
            row = slow_bucket(k - q, bidirectional, 32, 128)
            np.testing.assert_array_equal(whole[0, :, q, k], table[:, row])
    late = jax.jit(lambda first: module.apply(variables, 2, 9, first))(jnp.asarray(5))
    np.testing.assert_array_equal(late, whole[:, :, 5:7])


def test_layer_norm_divides_by_root_mean_square():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)) * 7, jnp.float32)
    scale = jnp.linspace(0.5, 2, 8)
    found = layers.LayerNorm(T5Config(vocab_size=4)).apply({"params": {"scale": scale}}, x)
    expected = np.asarray(x) / np.sqrt(
        np.mean(np.asarray(x, np.float64) ** 2, axis=-1, keepdims=True) + 1e-6
    )
    np.testing.assert_allclose(found, expected * np.asarray(scale), rtol=1e-5)


def test_attention_matches_loop_over_heads():
    config = T5Config(vocab_size=4, emb_dim=6, num_heads=3, head_dim=2)
    rng = np.random.default_rng(0)
    x, memory = (jnp.asarray(rng.normal(size=(2, n, 6)), jnp.float32) for n in (4, 5))
    mask = np.array([[1, 1, 1, 0, 1], [1, 0, 0, 0, 0]], bool)
    bias = jnp.asarray(rng.normal(size=(1, 3, 4, 5)), jnp.float32)
    allowed = jnp.asarray(mask)[:, None, None]
    module = Attention(config, deterministic=True)
    variables = module.init(jax.random.key(0), x, memory, bias, allowed)
    kernels = {name: np.asarray(p["kernel"]) for name, p in variables["params"].items()}
    expected = np.zeros((2, 4, 6))
    for example in range(2):
        heads = []
        for head in range(3):
            columns = slice(2 * head, 2 * head + 2)
            query = x[example] @ kernels["query"][:, columns]
            key = memory[example] @ kernels["key"][:, columns]
            value = memory[example] @ kernels["value"][:, columns]
            scores = np.exp(query @ key.T + np.asarray(bias)[0, head]) * mask[example]
            heads.append(scores / scores.sum(axis=1, keepdims=True) @ value)
        expected[example] = np.concatenate(heads, axis=1) @ kernels["out"]
    np.testing.assert_allclose(
        module.apply(variables, x, memory, bias, allowed), expected, atol=1e-5
    )


def slow_softmax(scores, bias, mask):
    """The textbook formula, differentiated automatically."""
    scores = scores if bias is None else scores + bias
    return jax.nn.softmax(scores + jnp.where(mask, 0.0, -1e10), axis=-1)


@pytest.mark.parametrize("with_bias", [True, False])
def test_masked_softmax_value_and_gradient_match_textbook(with_bias):
    rng = np.random.default_rng(0)
    scores, weights = (jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=(1, 3, 4, 5)), jnp.float32) if with_bias else None
    mask = jnp.asarray(rng.random((2, 1, 1, 5)) < 0.7).at[0].set(False)  # a row of only padding

    def run(softmax, scores, bias):
        return jnp.sum(weights * softmax(scores, bias, mask))

    lean = lambda *args: masked_softmax(*args, jnp.dtype("float32"))  # noqa: E731
    both = [
        jax.jit(jax.value_and_grad(functools.partial(run, f), argnums=(0, 1)))(scores, bias)
        for f in (lean, slow_softmax)
    ]
    for found, expected in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.all(np.isfinite(lean(scores, bias, mask)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_gradient_matches_textbook(dtype):
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=(2, 3, 8)), dtype) for _ in range(2))
    scale = jnp.linspace(0.5, 2, 8)

    def lean(x, scale):
        return jnp.sum((weights * rms_norm(x, scale, 1e-6, jnp.dtype(dtype))).astype(jnp.float32))

    def slow(x, scale):
        x = x.astype(jnp.float32)
        y = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale[None, None]
        return jnp.sum(weights.astype(jnp.float32) * y)

    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, scale) for f in (lean, slow))
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance)
