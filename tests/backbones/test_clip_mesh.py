"""CLIP on a mesh follows the logical axes, with the same results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpt_jax.backbones.clip import CLIP
from mpt_jax.backbones.clip.network import abstract_variables
from mpt_jax.backbones.t5.scanned_params import stack_layers
from mpt_jax.core.tree import flatten, unflatten
from mpt_jax.training.partitioning import standard_logical_axis_rules
from tests.fixtures.clip_models import IMAGE, random_images, random_params, tiny


@pytest.mark.devices(4)
@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True])
def test_clip_on_mesh_matches_one_device(scan_layers):
    image = dataclasses.replace(IMAGE, num_heads=4)
    config = tiny(image=image, scan_layers=scan_layers)
    params = random_params(dataclasses.replace(config, scan_layers=False))
    params = stack_layers(params) if scan_layers else params
    rng = np.random.default_rng(0)
    data = (
        random_images(config, 4),
        jnp.asarray(rng.normal(size=(4, image.num_layers, 2, image.emb_dim)), jnp.float32),
        jnp.asarray(rng.integers(0, 40, (4, 6)), jnp.int32),
        jnp.asarray([5, 3, 1, 5], jnp.int32),
    )
    model, variables = CLIP(config), abstract_variables(config)
    axes = flatten(variables["params_axes"], is_leaf=lambda x: hasattr(x, "names"))

    def loss(params, images, prompts, tokens, eot):
        variables = {"params": params}
        image = model.apply(variables, images, prompts, method="encode_image")
        embedded = model.apply(variables, tokens, method="embed_tokens")
        text = model.apply(variables, embedded, eot, method="encode_text")
        return jnp.sum(jnp.square(image @ text.T)), (image, text)

    step = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(step)(params, *data)

    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    rules = standard_logical_axis_rules()
    resources = dict(rules)
    with jax.set_mesh(mesh), partitioning.axis_rules(rules):
        placed = {}
        for name, leaf in flatten(params).items():
            spec = PartitionSpec(*(resources[a] for a in axes[f"{name}_axes"].names))
            placed[name] = jax.device_put(leaf, NamedSharding(mesh, spec))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        lowered = jax.jit(step).lower(unflatten(placed), *(jax.device_put(x, rows) for x in data))
        found = lowered.compile()(unflatten(placed), *(jax.device_put(x, rows) for x in data))
    # Each device has 2 of 4 images and half of the heads, from the network's constraints.
    assert "sharding_constraint" in lowered.as_text()
    for name, leaf in flatten(expected).items():
        tolerance = 1e-5 * max(1.0, float(np.abs(leaf).max()))
        np.testing.assert_allclose(flatten(found)[name], leaf, atol=tolerance, err_msg=name)
