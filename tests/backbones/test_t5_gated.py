"""The kernel of the gated feed-forward block against plain operations, including gradients.

The kernel runs interpreted here; `tests/plan/test_gated_plans.py` compiles it for TPUs.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.t5 import T5Config, Transformer, fused_mlp
from mpt_jax.core.tree import flatten
from mpt_jax.training.partitioning import PjitPartitioner

GATES = (("gelu", "linear"), ("silu", "linear"))
BATCH, LENGTH, TARGETS = 4, 131, 5
SHAPE = {
    "vocab_size": 32, "emb_dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 24,
    "num_encoder_layers": 2, "num_decoder_layers": 1, "mlp_activations": GATES[0],
    "fused_attention": False,
}  # fmt: skip


def close(ours, theirs) -> None:
    for name, value in flatten(theirs).items():
        scale = float(jnp.abs(value).max()) + 1e-6
        np.testing.assert_allclose(
            flatten(ours)[name] / scale, value / scale, atol=1e-5, rtol=0, err_msg=name
        )


# --- One block -----------------------------------------------------------------------------------


def block(batch: int, length: int, width: int, inner: int, drops: bool):
    """Input, matrices and dropout of a block, and a weight for every output."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    shapes = ((width, inner), (width, inner), (inner, width))
    matrices = tuple(normal(*shape) / np.sqrt(shape[0]) for shape in shapes)
    kept = jnp.asarray(rng.random((batch, 1, inner)) < 0.7, jnp.float32) / 0.7
    x, weights = normal(batch, length, width), normal(batch, length, width)
    return x, matrices, kept if drops else None, weights


def in_numpy(x, matrices, kept, gate: str) -> np.ndarray:
    x, *matrices = (np.asarray(a, np.float64) for a in (x, *matrices))
    a, b = x @ matrices[0], x @ matrices[1]
    tanh = np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))
    hidden = (a / 2 * (1 + tanh) if gate == "gelu" else a / (1 + np.exp(-a))) * b
    return (hidden if kept is None else hidden * np.asarray(kept)) @ matrices[2]


# Rows and columns that are one block, blocks of equal sizes, and blocks of which the last is short.
@pytest.mark.parametrize(
    ("length", "inner"), [(131, 24), (1024, 2048), (601, 1100)], ids=["one", "equal", "odd"]
)
@pytest.mark.parametrize("drops", [False, True], ids=["whole", "dropout"])
@pytest.mark.parametrize("gate", GATES, ids=["gelu", "silu"])
def test_gated_mlp_matches_plain_operations(length, inner, drops, gate):
    x, matrices, kept, weights = block(2, length, 16, inner, drops)

    def loss(function, x, matrices, *more):
        y = function(x, matrices, kept, gate, *more)
        return jnp.sum(weights * y), y

    def value_and_grad(of):
        run = jax.value_and_grad(loss, of, has_aux=True)
        return jax.jit(run, static_argnums=(0, 3))

    plain = value_and_grad((1, 2))(fused_mlp.reference_gated_mlp, x, matrices)
    (_, expected), (slope, slopes) = plain
    np.testing.assert_allclose(expected, in_numpy(x, matrices, kept, gate[0]), atol=1e-4)
    # Prompts are trained by gradients of the input: the kernel's backward pass.
    (_, found), d_x = value_and_grad(1)(fused_mlp.gated_mlp, x, matrices, True)
    close({"y": found, "x": d_x}, {"y": expected, "x": slope})
    (_, found), grads = value_and_grad((1, 2))(fused_mlp.gated_mlp, x, matrices, True)
    close({"y": found, "x": grads[0]}, {"y": expected, "x": slope})
    close(dict(enumerate(grads[1])), dict(enumerate(slopes)))


def test_gated_mlp_stores_only_the_input_and_weights():
    x, matrices, kept, _ = block(2, 131, 16, 24, True)
    _, pull = jax.vjp(lambda x: fused_mlp.gated_mlp(x, matrices, kept, GATES[0], True), x)
    stored = sorted(leaf.shape for leaf in jax.tree.leaves(pull))
    assert stored == sorted(leaf.shape for leaf in jax.tree.leaves((x, matrices, kept)))


def test_gated_mlp_fits_published_sizes():
    assert fused_mlp.fits(356, 768, 2048, 2)  # T5 1.1 base
    assert fused_mlp.fits(1024, 1024, 2816, 2)  # large
    assert not fused_mlp.fits(356, 2048, 5120, 2)  # XL: 63 MB of weights
    assert not fused_mlp.fits(16, 768, 2048, 2)  # targets


# --- The network ---------------------------------------------------------------------------------


def make(fused: bool, **fields) -> Transformer:
    return Transformer(T5Config(**{**SHAPE, **fields}, fused_mlp=fused))


def inputs():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, LENGTH, 16)), jnp.float32)
    mask = jnp.asarray(np.arange(LENGTH)[None] < np.array([131, 2, 70, 131])[:, None])
    targets = jnp.asarray(rng.integers(1, 32, (BATCH, TARGETS)), jnp.int32)
    return x, mask, targets, jnp.asarray(rng.normal(size=(BATCH, TARGETS, 32)), jnp.float32)


def gradients(model: Transformer, of, **call):
    _, mask, targets, weights = inputs()

    def loss(params, x):
        return jnp.sum(weights * model.apply({"params": params}, x, mask, targets, **call))

    return jax.jit(jax.grad(loss, of))


@pytest.mark.parametrize(
    "fields",
    [
        {"dropout_rate": 0.3},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"scan_layers": True, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"scan_layers": True, "remat": "minimal"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_network_with_fused_mlp_matches_plain_operations(fields):
    plain, kernel = make(False, **fields), make(True, **fields)
    x, mask, targets, _ = inputs()
    params = jax.jit(plain.init)(jax.random.key(0), x, mask, targets)["params"]
    same = jax.jit(kernel.init)(jax.random.key(0), x, mask, targets)["params"]
    jax.tree.map(np.testing.assert_array_equal, same, params)
    call = dict(deterministic="dropout_rate" not in fields, rngs={"dropout": jax.random.key(3)})
    expected = gradients(plain, (0, 1), **call)(params, x)
    found = gradients(kernel, (0, 1), **call)(params, x)
    close(found[0], expected[0])
    close({"x": found[1]}, {"x": expected[1]})
    only = gradients(kernel, 1, **call)
    close({"x": only(params, x)}, {"x": expected[1]})
    assert "mlp_backward_kernel" in str(only.trace(params, x).jaxpr)


@pytest.mark.slow
@pytest.mark.devices(8)
def test_network_with_fused_mlp_on_mesh_matches_plain_operations():
    plain, kernel = make(False, dropout_rate=0.3), make(True, dropout_rate=0.3)
    x, mask, targets, _ = inputs()
    params = jax.jit(plain.init)(jax.random.key(0), x, mask, targets)["params"]
    call = dict(deterministic=False, rngs={"dropout": jax.random.key(3)})
    expected = gradients(plain, (0, 1), **call)(params, x)
    partitioner = PjitPartitioner(num_partitions=1, devices=jax.devices()[:BATCH])
    with partitioner.activate():
        rows = jax.device_put(x, partitioner.batch_sharding)
        found = gradients(kernel, (0, 1), **call)(params, rows)
        only = gradients(kernel, 1, **call)(params, rows)
    close(found[0], expected[0])
    close({"x": found[1]}, {"x": expected[1]})
    close({"x": only}, {"x": expected[1]})


def uses_kernel(**fields) -> bool:
    x, mask, targets, _ = inputs()
    init = jax.make_jaxpr(make(True, **fields).init)
    return bool(re.search("mlp_forward_kernel", str(init(jax.random.key(0), x, mask, targets))))


@pytest.mark.devices(8)
def test_network_uses_plain_operations_for_biases_model_axis_and_one_activation():
    assert uses_kernel()
    assert not uses_kernel(biases=True)
    assert not uses_kernel(mlp_activations=("relu",))
    with PjitPartitioner(num_partitions=2, devices=jax.devices()[:8]).activate():
        assert not uses_kernel()
