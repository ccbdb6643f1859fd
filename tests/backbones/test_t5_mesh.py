"""Activations on a mesh follow T5X's logical axes, with the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpt_jax.backbones.t5 import T5Config, Transformer, parameter_shapes
from mpt_jax.core.tree import flatten, unflatten

RULES = (
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", None),
    ("kv", None),
    ("length", None),
    ("relpos_buckets", None),
    ("layers", None),
)


@pytest.mark.devices(4)
@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True])
def test_transformer_on_mesh_matches_one_device(scan_layers):
    config = T5Config(
        vocab_size=32,
        emb_dim=16,
        num_heads=4,
        head_dim=4,
        mlp_dim=24,
        num_encoder_layers=2,
        num_decoder_layers=2,
        logits_via_embedding=True,
        scan_layers=scan_layers,
    )
    model, rng = Transformer(config), np.random.default_rng(0)
    shapes = parameter_shapes(config)
    params = unflatten(
        {name: rng.normal(0, 0.3, s).astype("float32") for name, s in shapes.items()}
    )
    tokens = jnp.asarray(rng.integers(1, 32, (4, 6)), jnp.int32)
    mask = jnp.arange(6)[None] < jnp.asarray([[6], [3], [4], [6]])
    data = (tokens, mask, tokens[:, :3])
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *data))
    axes = flatten(variables["params_axes"], is_leaf=lambda x: hasattr(x, "names"))

    def loss(params, *data):
        logits = model.apply({"params": params}, *data)
        return jnp.sum(logits**2), logits

    step = jax.value_and_grad(loss, has_aux=True)
    assert "sharding_constraint" not in jax.jit(step).lower(params, *data).as_text()
    expected = jax.jit(step)(params, *data)

    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    resources = dict(RULES)
    with jax.set_mesh(mesh), partitioning.axis_rules(RULES):
        placed = unflatten(
            {
                name: jax.device_put(
                    leaf,
                    NamedSharding(
                        mesh, PartitionSpec(*(resources[a] for a in axes[f"{name}_axes"].names))
                    ),
                )
                for name, leaf in flatten(params).items()
            }
        )
        rows = NamedSharding(mesh, PartitionSpec("data"))
        data = tuple(jax.device_put(x, rows) for x in data)
        lowered = jax.jit(step).lower(placed, *data)
        compiled = lowered.compile()
        found = compiled(placed, *data)
    # Each device has 2 of 4 examples and 2 of 4 heads, from the network's constraints.
    assert "sharding_constraint" in lowered.as_text()
    assert "2,2,6,4" in compiled.as_text() or "2,6,2,4" in compiled.as_text()
    for name, leaf in flatten(expected).items():
        scale = max(1.0, float(np.abs(leaf).max()))
        np.testing.assert_allclose(flatten(found)[name], leaf, atol=2e-5 * scale, err_msg=name)
