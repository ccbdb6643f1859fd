"""Stacked layers and recomputation give the same results as separate layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5 import T5Config, Transformer, parameter_shapes
from mpt_jax.backbones.t5.scanned_params import is_stacked, stack_layers, unstack_layers
from mpt_jax.core.tree import flatten, unflatten

SHAPE = {"vocab_size": 30, "emb_dim": 16, "num_heads": 4, "head_dim": 5, "mlp_dim": 24}
LAYERS = {"num_encoder_layers": 2, "num_decoder_layers": 3}


def tiny(**fields) -> T5Config:
    return T5Config(**SHAPE, **LAYERS, mlp_activations=("gelu", "linear"), **fields)


@functools.cache
def random_params() -> dict:
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(tiny())
    return unflatten({name: rng.normal(0, 0.3, s).astype(np.float32) for name, s in shapes.items()})


def batch() -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens = jnp.asarray(np.random.default_rng(1).integers(2, 30, (2, 9)), jnp.int32)
    return tokens, jnp.arange(9)[None] < jnp.asarray([[9], [5]]), tokens[:, :4]


def test_stack_layers_round_trip_is_exact():
    params = random_params()
    stacked = stack_layers(params)
    assert is_stacked(stacked) and not is_stacked(params)
    kernel = stacked["decoder"]["decoder"]["mlp"]["wo"]["kernel"]
    assert kernel.shape == (24, 3, 16)
    layer = params["decoder"]["layers_2"]["mlp"]["wo"]["kernel"]
    np.testing.assert_array_equal(kernel[:, 2], layer)
    back = flatten(unstack_layers(stacked))
    assert set(back) == set(flatten(params))
    for name, leaf in flatten(params).items():
        assert isinstance(back[name], np.ndarray)
        np.testing.assert_array_equal(back[name], leaf)


def test_stack_layers_missing_layer_error():
    params = random_params()
    params = {**params, "encoder": {**params["encoder"]}}
    del params["encoder"]["layers_0"]
    with pytest.raises(ValueError, match="missing from these layers of the encoder, .*: 0"):
        stack_layers(params)


def test_scanned_params_match_t5x_shapes_and_axes():
    config = tiny(scan_layers=True)
    stacked = flatten(stack_layers(random_params()))
    assert parameter_shapes(config) == {name: leaf.shape for name, leaf in stacked.items()}
    data = batch()
    variables = jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), *data))
    axes = flatten(variables["params_axes"], is_leaf=lambda x: hasattr(x, "names"))
    name = "encoder/encoder/attention/query/kernel_axes"
    assert tuple(axes[name].names) == ("embed", "layers", "joined_kv")
    for name, leaf in stacked.items():
        assert len(axes[f"{name}_axes"].names) == leaf.ndim


@functools.cache
def outputs_and_slopes(**fields):
    """Logits, hidden states, and gradients of weights and inputs, all in the unscanned tree."""
    config, (tokens, mask, decoder) = tiny(**fields), batch()
    model, scanned = Transformer(config), config.scan_layers
    params = jax.tree.map(jnp.asarray, random_params())
    embedded = params["token_embedder"]["embedding"][tokens]
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 30)), jnp.float32)

    @jax.jit
    def run(params, embedded):
        def loss(params, embedded):
            variables = {"params": params}
            encoded, hidden = model.apply(
                variables, embedded, mask, return_hidden=True, method="encode"
            )
            logits, more = model.apply(
                variables, encoded, mask, decoder, return_hidden=True, method="decode"
            )
            return jnp.sum(logits * weights), (logits, hidden + more)

        slopes, outputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, embedded)
        return outputs, slopes

    outputs, slopes = run(stack_layers(params) if scanned else params, embedded)
    return outputs, (unstack_layers(slopes[0]) if scanned else slopes[0], slopes[1])


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [
        ("minimal", False),
        ("full", True),
        pytest.param("none", True, marks=pytest.mark.slow),
        pytest.param("minimal", True, marks=pytest.mark.slow),
        pytest.param("full", False, marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_outputs_and_gradients_match(remat, scan_layers):
    expected = outputs_and_slopes()
    found = outputs_and_slopes(remat=remat, scan_layers=scan_layers)
    for name, leaf in flatten(expected).items():
        tolerance = 1e-5 * max(1.0, float(np.abs(leaf).max()))
        np.testing.assert_allclose(flatten(found)[name], leaf, atol=tolerance, err_msg=name)


def test_scanned_layers_cached_decoding_matches_whole_sequence():
    config, (tokens, mask, decoder) = tiny(scan_layers=True), batch()
    variables = {"params": jax.tree.map(jnp.asarray, stack_layers(random_params()))}
    model = Transformer(config)

    @jax.jit
    def step(cache, encoded, new):
        settings = {"decode": True, "max_decode_length": 4, "mutable": ["cache"]}
        return model.apply({**variables, **cache}, encoded, mask, new, method="decode", **settings)

    encoded = jax.jit(lambda: model.apply(variables, tokens, mask, method="encode"))()
    whole = jax.jit(lambda: model.apply(variables, encoded, mask, decoder, method="decode"))()
    _, cache = step({}, encoded, decoder[:, :1])
    assert cache["cache"]["decoder"]["decoder"]["self_attention"]["cached_key"].shape[:2] == (3, 2)
    found = []
    for i in range(4):
        logits, cache = step(cache, encoded, decoder[:, i : i + 1])
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=1e-5)


def test_remat_reduces_stored_residuals():
    """Residuals of the backward pass, counted in the traced program: full < minimal < none."""

    def residuals(remat: str) -> int:
        config, (tokens, mask, decoder) = tiny(remat=remat), batch()
        params = jax.tree.map(jnp.asarray, random_params())
        embedded = params["token_embedder"]["embedding"][tokens]
        call = lambda x: Transformer(config).apply({"params": params}, x, mask, decoder)  # noqa: E731
        backward = jax.eval_shape(lambda x: jax.vjp(call, x)[1], embedded)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert residuals("full") < residuals("minimal") < residuals("none")
