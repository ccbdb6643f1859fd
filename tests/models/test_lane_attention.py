"""Attention of lanes over patches, compared with NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.models.lane_attention import lane_attention
from tests.fixtures import clip_models, reference_lanes, tiny_clip, tiny_lanes

SETTINGS = {
    "vit": {},
    "clip": {"config": clip_models.tiny()},
    "summaries kept": {"prompt": tiny_lanes.method(drop_and_replace=False)},
    "no keys": {"prompt": tiny_lanes.method(layers=0)},
    "one selector": {"prompt": tiny_lanes.method(selectors=1)},
}


def expected(model, params, image, row):
    """The maps [layers, I] of one image in one lane, in float64."""
    lanes = model.prompt.lanes(params["prompt"], model.runs, jnp.arange(model.runs.num_rows))
    own = {name: np.asarray(x)[row] for name, x in lanes._asdict().items()}
    kept, maps = model.prompt.drop_and_replace, []
    reference_lanes.feature(
        model.module.config, params, image, **own, drop_and_replace=kept, maps=maps
    )
    return np.stack(maps)


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_equals_a_naive_numpy_pass(name):
    model = tiny_lanes.model(**SETTINGS[name])
    params, made = tiny_lanes.params(model), tiny_clip.batch([0, 1], [0, 1], 3)
    found = np.asarray(jax.jit(lambda p, b: lane_attention(model, p, b))(params, made))
    tower = model.module.config.image
    assert found.shape == (2, 3, tower.num_layers, tower.num_tokens)
    for image, of_lanes in zip(made["image"], found, strict=True):
        for row, maps in enumerate(of_lanes):
            np.testing.assert_allclose(maps, expected(model, params, image, row), atol=1e-5)
    shares = found.sum(-1)
    assert (shares > 0).all() and (shares < 1).all() and np.ptp(shares) > 0.05


def test_lanes_without_selectors_have_none():
    model = tiny_lanes.model(tiny_lanes.method(selectors=0))
    params, made = tiny_lanes.params(model), tiny_clip.batch([0], [0], 0)
    with pytest.raises(ValueError, match="no selectors.*SELECTORS of at least 1"):
        lane_attention(model, params, made)
