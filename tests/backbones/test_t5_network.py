"""The encoder-decoder: T5X's tree, packing, caching, hidden states, dropout, published sizes."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5 import T5Config, Transformer, parameter_shapes, t5_config
from mpt_jax.backbones.t5.attention import Attention
from mpt_jax.core.tree import flatten, unflatten

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "t5x_tree.json").read_text())
T5_1_0 = {"mlp_activations": ("relu",), "logits_via_embedding": True}
T5_1_1 = {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False}


def tiny(**fields) -> T5Config:
    shape = {"vocab_size": 30, "emb_dim": 16, "num_heads": 4, "head_dim": 5, "mlp_dim": 24}
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 2}
    return T5Config(**{**shape, **layers, **T5_1_1, **fields})


@functools.cache
def random_params(config: T5Config) -> dict:
    """Weights from NumPy, large enough that attention is far from uniform."""
    rng = np.random.default_rng(0)
    leaves = {}
    for name, shape in parameter_shapes(config).items():
        scale = {"scale": 0.2, "embedding": 1.0, "bias": 0.0}.get(name.rpartition("/")[2], 0.3)
        leaves[name] = jnp.asarray(rng.normal(name.endswith("scale"), scale, shape), jnp.float32)
    return unflatten(leaves)


def apply(config: T5Config, params: dict, *args, **settings):
    """One compiled call of the network; `settings` are static."""
    call = lambda params, *args: Transformer(config).apply({"params": params}, *args, **settings)  # noqa: E731
    return jax.jit(call)(params, *args)


def batch(seed: int = 0, lengths=(11, 7, 1), targets: int = 5):
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    tokens = rng.integers(2, 30, mask.shape) * mask
    decoder = rng.integers(2, 30, (len(lengths), targets))
    decoder[:, 0] = 0
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.asarray(decoder, jnp.int32)


@pytest.mark.parametrize("version", ["t5_1_0", "t5_1_1"])
def test_transformer_tree_matches_t5x_names_shapes_and_axes(version):
    fields = GOLDEN[version]["config"]
    config = T5Config(**{**fields, "mlp_activations": tuple(fields["mlp_activations"])})
    tokens = jnp.ones((1, 2), jnp.int32)
    variables = jax.eval_shape(
        lambda: Transformer(config).init(jax.random.key(0), tokens, tokens > 0, tokens)
    )
    axes = {
        name.removesuffix("_axes"): tuple(leaf.names)
        for name, leaf in flatten(
            variables["params_axes"], is_leaf=lambda x: hasattr(x, "names")
        ).items()
    }
    expected = GOLDEN[version]["parameters"]
    assert parameter_shapes(config) == {name: tuple(row[0]) for name, row in expected.items()}
    assert axes == {name: tuple(row[1]) for name, row in expected.items()}


# Totals as the model cards and papers state them (T5 1.0 small 60.5 M, base 222.9 M, ...), to the
# parameter, the mT5 and ByT5 rows from their own papers' architectures.
TOTALS = {
    "t5_1_0_small": 60_506_624,
    "t5_1_0_base": 222_903_552,
    "t5_1_0_large": 737_668_096,
    "t5_1_0_3b": 2_851_598_336,
    "t5_1_0_11b": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "flan_t5_base": 247_577_856,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
}


# Scanned layers are traced once; separate layers, with the same parameters, one by one.
@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TOTALS)
def test_t5_config_published_sizes_have_published_param_counts(name, scan_layers):
    shapes = parameter_shapes(t5_config(name, scan_layers=scan_layers))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == TOTALS[name]


def test_t5_config_unsupported_values_error():
    with pytest.raises(ValueError, match="overflow"):
        tiny(dtype="float16")
    with pytest.raises(ValueError, match="float64"):
        tiny(dtype="float64")
    with pytest.raises(ValueError, match="t5_1_0_small"):
        t5_config("t5_2_small")
    with pytest.raises(ValueError, match="swish"):
        tiny(mlp_activations=("swish",))
    with pytest.raises(ValueError, match="minimal"):
        tiny(remat="most")


@pytest.mark.parametrize("version", [T5_1_0, T5_1_1])
def test_transformer_padding_does_not_change_logits(version):
    config = tiny(**version)
    params, (tokens, mask, decoder) = random_params(config), batch()
    together = apply(config, params, tokens, mask, decoder)
    for row, length in ((1, 7), (2, 1)):
        one = slice(row, row + 1)
        alone = apply(config, params, tokens[one, :length], mask[one, :length], decoder[one])
        np.testing.assert_allclose(together[one], alone, atol=2e-5)


def test_encode_embeddings_match_tokens():
    config = tiny()
    params, (tokens, mask, decoder) = random_params(config), batch()
    embedded = apply(config, params, tokens, method="embed")
    table = np.asarray(params["token_embedder"]["embedding"])
    np.testing.assert_array_equal(embedded, table[np.asarray(tokens)])
    np.testing.assert_array_equal(
        apply(config, params, embedded, mask, decoder),
        apply(config, params, tokens, mask, decoder),
    )


def test_transformer_packed_rows_match_separate_examples():
    """Two examples in one row do not attend to each other; logits and gradients agree to 2e-5."""
    config = tiny()
    params, model = random_params(config), Transformer(config)
    rng = np.random.default_rng(1)
    embedded = [jnp.asarray(rng.normal(size=(1, n, 16)), jnp.float32) for n in (6, 9)]
    decoders = [jnp.asarray(rng.integers(0, 30, (1, n)), jnp.int32) for n in (3, 4)]
    weights = [rng.normal(size=(1, n, 30)).astype(np.float32) for n in (3, 4)]
    segments = jnp.asarray([[1] * 6 + [2] * 9 + [0] * 2], jnp.int32)
    decoder_segments = jnp.asarray([[1] * 3 + [2] * 4 + [0]], jnp.int32)

    def alone(x, decoder, weight):
        logits = model.apply({"params": params}, x, jnp.ones(x.shape[:2], bool), decoder)
        return jnp.sum(logits * weight), logits

    def packed(x, decoder, weight):
        logits = model.apply(
            {"params": params},
            jnp.pad(x, ((0, 0), (0, 2), (0, 0))),
            segments > 0,
            jnp.pad(decoder, ((0, 0), (0, 1))),
            encoder_segment_ids=segments,
            decoder_segment_ids=decoder_segments,
        )[:, :7]
        return jnp.sum(logits * weight), logits

    gradient_of = lambda f, *args: jax.jit(jax.value_and_grad(f, has_aux=True))(*args)  # noqa: E731
    separate = [gradient_of(alone, *x) for x in zip(embedded, decoders, weights, strict=True)]
    expected = np.concatenate([logits for (_, logits), _ in separate], axis=1)
    slopes = np.concatenate([slope for _, slope in separate], axis=1)
    joined = [jnp.concatenate(x, axis=1) for x in (embedded, decoders, weights)]
    (_, found), found_slopes = gradient_of(packed, *joined)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(found_slopes, slopes, atol=2e-5 * np.abs(slopes).max())


@pytest.mark.parametrize("version", [T5_1_0, T5_1_1])
def test_decode_cached_steps_match_whole_sequence(version):
    config = tiny(**version)
    params, (tokens, mask, decoder) = random_params(config), batch(targets=6)
    encoded = apply(config, params, tokens, mask, method="encode")
    whole = apply(config, params, encoded, mask, decoder, method="decode")

    @jax.jit
    def step(cache, new):
        return Transformer(config).apply(
            {"params": params, **cache},
            encoded,
            mask,
            new,
            decode=True,
            max_decode_length=6,
            mutable=["cache"],
            method="decode",
        )

    _, cache = step({}, decoder[:, :1])
    assert cache["cache"]["decoder"]["cache_index"] == 0
    found = []
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 6)):  # a chunk of three among single steps
        logits, cache = step(cache, decoder[:, start:stop])
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=2e-5)
    assert cache["cache"]["decoder"]["cache_index"] == 6


def test_decode_packed_rows_or_missing_length_error():
    config = tiny()
    params, (_, mask, decoder) = random_params(config), batch()
    data = (params, jnp.zeros((3, 11, 16)), mask, decoder)
    settings = {"method": "decode", "decode": True, "mutable": ["cache"]}
    with pytest.raises(ValueError, match="max_decode_length"):
        apply(config, *data, **settings)
    settings |= {"max_decode_length": 5, "decoder_segment_ids": decoder}
    with pytest.raises(ValueError, match="pack"):
        apply(config, *data, **settings)


def test_hidden_states_start_at_embeddings_and_end_at_output():
    config = tiny(num_encoder_layers=3)
    params, (tokens, mask, decoder) = random_params(config), batch()
    encoded, hidden = apply(config, params, tokens, mask, return_hidden=True, method="encode")
    assert len(hidden) == 4
    table = np.asarray(params["token_embedder"]["embedding"])
    np.testing.assert_array_equal(hidden[0], table[np.asarray(tokens)])
    np.testing.assert_array_equal(hidden[-1], encoded)
    logits, hidden = apply(
        config, params, encoded, mask, decoder, return_hidden=True, method="decode"
    )
    assert len(hidden) == 3
    kernel = np.asarray(params["decoder"]["logits_dense"]["kernel"])
    np.testing.assert_allclose(np.asarray(hidden[-1]) @ kernel, logits, atol=1e-5)


def test_dropout_only_in_training_and_depends_on_key():
    config = tiny(dropout_rate=0.3)
    params, data = random_params(config), batch()

    @functools.partial(jax.jit, static_argnums=1)
    def call(seed, deterministic):
        rngs = {"dropout": jax.random.key(seed)}
        model = Transformer(config)
        return model.apply({"params": params}, *data, deterministic=deterministic, rngs=rngs)

    np.testing.assert_array_equal(call(0, True), call(1, True))
    np.testing.assert_array_equal(call(0, False), call(0, False))
    assert not np.allclose(call(0, False), call(1, False))
    assert not np.allclose(call(0, False), call(0, True))


def test_attention_dropout_drops_a_key_for_all_queries():
    """As T5 does: one mask of each example and head for all rows of the probabilities."""
    length, rate = 8, 0.5
    config = tiny(emb_dim=length, num_heads=2, head_dim=length, dropout_rate=rate)
    params = {
        "query": {
            "kernel": jnp.zeros((length, 2 * length))
        },  # so that probabilities are 1 / length
        "key": {"kernel": jnp.zeros((length, 2 * length))},
        "value": {"kernel": jnp.concatenate([jnp.eye(length)] * 2, axis=1)},
        "out": {"kernel": jnp.concatenate([jnp.eye(length), 100 * jnp.eye(length)])},
    }
    memory = jnp.stack([jnp.eye(length)] * 3)
    mask = jnp.ones((3, 1, 5, length), bool)
    attention = Attention(config, deterministic=False)
    rngs = {"dropout": jax.random.key(0)}
    found = attention.apply({"params": params}, memory[:, :5], memory, None, mask, rngs=rngs)
    np.testing.assert_allclose(found, jnp.broadcast_to(found[:, :1], found.shape), rtol=1e-6)
    kept = found[:, 0] * length * (1 - rate)  # 1 if the first head keeps a key, + 100 if the second
    assert set(np.unique(np.round(kept)).tolist()) == {0, 1, 100, 101}
    assert len({tuple(row) for row in np.round(kept).tolist()}) == 3, "each example has its masks"


def test_biases_zero_values_do_not_change_logits():
    config = tiny(biases=True)
    plain, biased = flatten(random_params(tiny())), flatten(random_params(config))
    added = set(biased) - set(plain)
    assert {name.rpartition("/")[2] for name in added} == {"bias"}
    per_layer = {"encoder": 4 + 3 + 2, "decoder": 8 + 3 + 3}  # projections, feed-forward, norms
    assert len(added) == 2 * sum(per_layer.values()) + 3  # two layers each, final norms, logits
    zeros = {name: biased[name] for name in added}
    assert not any(np.any(leaf) for leaf in zeros.values())
    data = batch()
    np.testing.assert_allclose(
        apply(config, unflatten({**plain, **zeros}), *data),
        apply(tiny(), unflatten(plain), *data),
        atol=1e-6,
    )


def test_biases_all_except_keys_have_gradients():
    config = tiny(biases=True)
    params, data = random_params(config), batch()
    loss = lambda params: Transformer(config).apply({"params": params}, *data).var()  # noqa: E731
    slopes = flatten(jax.jit(jax.grad(loss))(params))
    biases = [name for name in slopes if name.endswith("/bias")]
    idle = {name for name in biases if not np.any(np.abs(slopes[name]) > 1e-6)}
    # A key bias shifts all scores of a query equally, so softmax does not depend on it.
    assert idle == {name for name in biases if "/key/" in name}


def test_bfloat16_model_returns_float32_logits():
    config = tiny(dtype="bfloat16")
    params, data = random_params(config), batch()
    assert apply(config, params, *data[:2], method="encode").dtype == jnp.bfloat16
    logits = apply(config, params, *data)
    assert logits.dtype == jnp.float32
    exact = apply(tiny(), params, *data)
    # bfloat16 keeps 8 bits; two layers of them leave a few percent of the logits' spread.
    assert 1e-3 < np.std(logits - exact) / np.std(exact) < 0.1
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert np.std(apply(config, halved, *data) - exact) / np.std(exact) < 0.1


def test_initial_weights_match_t5x_scale():
    config = tiny(emb_dim=64, num_heads=8, head_dim=16, mlp_dim=96, vocab_size=500)
    tokens = jnp.ones((1, 2), jnp.int32)
    init = jax.jit(lambda key: Transformer(config).init(key, tokens, tokens > 0, tokens)["params"])
    params = flatten(init(jax.random.key(0)))
    spread = {
        "token_embedder/embedding": 1.0,
        "encoder/layers_0/attention/query/kernel": (64 * 16) ** -0.5,
        "encoder/layers_0/attention/key/kernel": 64**-0.5,
        "decoder/layers_1/encoder_decoder_attention/out/kernel": 128**-0.5,
        "encoder/layers_1/mlp/wi_1/kernel": 64**-0.5,
        "encoder/layers_1/mlp/wo/kernel": 96**-0.5,
        "decoder/relpos_bias/rel_embedding": (2 / (8 + 32)) ** 0.5,
    }
    for name, expected in spread.items():
        np.testing.assert_allclose(np.std(params[name]), expected, rtol=0.1)
    assert np.all(params["encoder/encoder_norm/scale"] == 1)
