"""Fused attention against attention by plain operations, including gradients.

The kernels run interpreted here; `tests/plan/test_plan.py` compiles them for TPUs.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5 import T5Config, Transformer
from mpt_jax.backbones.t5 import fused_attention as fused
from mpt_jax.core.tree import flatten
from mpt_jax.training.partitioning import PjitPartitioner

BATCH, LENGTH, TARGETS, VOCABULARY = 4, 13, 5, 32  # targets at most half of head_dim
SHAPE = {
    "vocab_size": VOCABULARY, "emb_dim": 16, "num_heads": 4, "head_dim": 10, "mlp_dim": 24,
    "num_encoder_layers": 2, "num_decoder_layers": 2,
}  # fmt: skip
PACKED = {
    "encoder_segment_ids": np.repeat([[1] * 6 + [2] * 4 + [0] * 3], BATCH, 0),
    "decoder_segment_ids": np.repeat([[1, 1, 2, 2, 0]], BATCH, 0),
}


def make(fused_attention: bool, **fields) -> Transformer:
    return Transformer(T5Config(**{**SHAPE, **fields}, fused_attention=fused_attention))


def inputs(packed: bool):
    """Embeddings, mask, targets, segments, and a weight for every logit of a real target."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, LENGTH, 16)), jnp.float32)
    lengths = np.array([13, 2, 7, 13])[:, None]
    targets = jnp.asarray(rng.integers(1, VOCABULARY, (BATCH, TARGETS)), jnp.int32)
    weights = rng.normal(size=(BATCH, TARGETS, VOCABULARY)).astype("float32")
    segments = {}
    mask = np.arange(LENGTH)[None] < lengths
    if packed:
        segments = {name: jnp.asarray(ids, jnp.int32) for name, ids in PACKED.items()}
        mask = PACKED["encoder_segment_ids"] > 0
        weights[:, -1] = 0
    return x, jnp.asarray(mask), targets, segments, jnp.asarray(weights)


def loss(model: Transformer, params, x, packed: bool, **call) -> jax.Array:
    _, mask, targets, segments, weights = inputs(packed)
    logits = model.apply({"params": params}, x, mask, targets, **segments, **call)
    return jnp.sum(weights * logits)


def gradients(model: Transformer, of, **call):
    grad = jax.grad(loss, of)
    return jax.jit(lambda *given: grad(model, *given, **call), static_argnums=2)


def close(ours, theirs) -> None:
    for name, value in flatten(theirs).items():
        scale = float(jnp.abs(value).max()) + 1e-6
        np.testing.assert_allclose(
            flatten(ours)[name] / scale, value / scale, atol=1e-5, rtol=0, err_msg=name
        )


@pytest.mark.parametrize(
    ("packed", "fields"),
    [
        (True, {}),
        pytest.param(False, {"scan_layers": True, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param(False, {"relative_bias_per_layer": True}, marks=pytest.mark.slow),
        pytest.param(False, {}, marks=pytest.mark.slow),
        pytest.param(True, {"scan_layers": True, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param(True, {"relative_bias_per_layer": True}, marks=pytest.mark.slow),
    ],
)
def test_fused_attention_matches_plain_operations(fields, packed):
    plain, kernels = make(False, **fields), make(True, **fields)
    x, mask, targets, _, _ = inputs(packed)
    params = jax.jit(plain.init)(jax.random.key(0), x, mask, targets)["params"]
    same = jax.jit(kernels.init)(jax.random.key(0), x, mask, targets)["params"]
    jax.tree.map(np.testing.assert_array_equal, same, params)
    # Prompts are trained by gradients of the input. Full fine-tuning needs those of the weights,
    # including relative positions.
    expected = gradients(plain, (1, 2))(params, x, packed)
    found = gradients(kernels, (1, 2))(params, x, packed)
    close(found[0], expected[0])
    close({"x": found[1]}, {"x": expected[1]})
    # If only the input is trainable, the backward pass is the kernel's own.
    only = gradients(kernels, 2)(params, x, packed)
    close({"x": only}, {"x": expected[1]})


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("model_axis", [1, 2, 4])
def test_fused_attention_on_mesh_matches_plain_operations(model_axis):
    plain, kernels = make(False), make(True)
    x, mask, targets, _, _ = inputs(False)
    params = jax.jit(plain.init)(jax.random.key(0), x, mask, targets)["params"]
    expected = gradients(plain, (1, 2))(params, x, False)
    # As many data shards as there are examples, or fewer.
    devices = jax.devices()[: min(8, BATCH * model_axis)]
    partitioner = PjitPartitioner(num_partitions=model_axis, devices=devices)
    with partitioner.activate():
        rows = jax.device_put(x, partitioner.batch_sharding)
        found = gradients(kernels, (1, 2))(params, rows, False)
    close(found[0], expected[0])
    close({"x": found[1]}, {"x": expected[1]})


def kernels_of(targets: int, deterministic: bool = True, **fields) -> set[str]:
    x, mask, tokens, _, _ = inputs(False)
    tokens, model = jnp.resize(tokens, (BATCH, targets)), make(True, **fields)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    call = lambda: model.init(keys, x, mask, tokens, deterministic=deterministic)  # noqa: E731
    return set(re.findall(r"_?(\w+)_forward_kernel", str(jax.make_jaxpr(call)())))


def test_fused_attention_with_dropout_only_for_self_attention():
    assert kernels_of(5, dropout_rate=0.1) == {"self", "memory"}
    assert kernels_of(5, False, dropout_rate=0.1) == {"self"}
    assert kernels_of(5, biases=True) == set()


@pytest.mark.parametrize(
    ("packed", "layers"),
    [
        (True, 1),
        pytest.param(True, 2, marks=pytest.mark.slow),
        pytest.param(False, 2, marks=pytest.mark.slow),
    ],
)
def test_fused_attention_with_dropout_drops_the_same_keys(packed, layers):
    fields = dict(dropout_rate=0.3, num_encoder_layers=layers, num_decoder_layers=layers)
    plain, kernels = make(False, **fields), make(True, **fields)
    x, mask, targets, _, _ = inputs(packed)
    params = jax.jit(plain.init)(jax.random.key(0), x, mask, targets)["params"]
    call = dict(deterministic=False, rngs={"dropout": jax.random.key(3)})
    expected = gradients(plain, (1, 2), **call)(params, x, packed)
    found = gradients(kernels, (1, 2), **call)(params, x, packed)
    close(found[0], expected[0])
    close({"x": found[1]}, {"x": expected[1]})
    without = gradients(kernels, (1, 2))(params, x, packed)
    assert not np.allclose(without[1], found[1], atol=1e-3)


def test_fused_attention_not_used_for_long_rows_or_targets():
    assert fused.self_attention_fits(1024)
    assert not fused.self_attention_fits(1025)
    assert fused.over_memory_fits(12 * 16, 356, 768, 2)  # T5-base
    assert not fused.over_memory_fits(128 * 32, 512, 1024, 2)  # 11B: 82 MiB, by the compiler
    assert not fused.over_memory_fits(64 * 32, 356, 4096, 2)  # XXL on one chip
    assert kernels_of(5) == {"self", "memory"}
    assert kernels_of(6) == {"self"}


@pytest.mark.parametrize(("number", "width", "length"), [(12, 64, 356), (8, 64, 228), (3, 8, 5)])
def test_heads_join_and_part_round_trip(number, width, length):
    heads = fused.Heads.of(number, width, length)
    assert number % heads.in_block == 0
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.normal(size=(6, number * width)), jnp.float32) for _ in range(3)]
    x = jnp.asarray(rng.normal(size=(2, length, 6)), jnp.float32)
    for part, kernel in zip(heads.part(x @ heads.join(kernels)), kernels, strict=True):
        apart = (x @ kernel).reshape(2, length, number, width).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(part, apart, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{}, pytest.param({"scan_layers": True}, marks=pytest.mark.slow)], ids=str
)
def test_decode_with_fused_attention_matches_plain_operations(fields):
    """The kernel needs no keys and values of the input, so they are not in the cache."""
    x, mask, targets, _, _ = inputs(False)
    plain = make(False, **fields)
    params = jax.jit(plain.init)(jax.random.key(0), x, mask, targets)["params"]
    expected = plain.apply({"params": params}, x, mask, targets, method="decode")

    @jax.jit
    def step(cache, new):
        call = dict(decode=True, max_decode_length=TARGETS, mutable=["cache"], method="decode")
        return make(True, **fields).apply({"params": params, **cache}, x, mask, new, **call)

    _, cache = step({}, targets[:, :1])
    assert not any("memory_" in name for name in flatten(cache))
    found = []
    for start, stop in ((0, 1), (1, 3), (3, 4), (4, 5)):
        logits, cache = step(cache, targets[:, start:stop])
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=2e-5)
