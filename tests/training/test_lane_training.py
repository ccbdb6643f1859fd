"""Training steps of lanes: held rows, microbatches, failed runs, and what cannot run them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.core.tree import split
from mpt_jax.training import trainer
from mpt_jax.training.image_cache import ImageCache
from mpt_jax.training.optimizers import sgd
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import create_train_state, trainable_labels
from mpt_jax.training.train_step import gradients
from tests.fixtures import tiny_clip, tiny_lanes

APART = Runs([task.task for task in tiny_lanes.TASKS], groups="independent")
KEY = jax.random.PRNGKey(0)
# Not Adam, which enlarges rounding of small gradients.
RECIPE = dataclasses.replace(tiny_lanes.optimizer(), rule=functools.partial(sgd, 0.9, 0.0))


def batch(rows):
    label = [-1 if row == 2 else row % 3 for row in rows]
    made = tiny_clip.batch(rows, label)
    labels = np.random.default_rng(1).integers(0, 2, (len(rows), 4))
    return {**made, "labels": jnp.asarray(labels, jnp.float32)}


def started(model, params=None, **settings):
    params = jax.tree.map(jnp.array, params or tiny_lanes.params(model))
    partitioner = PjitPartitioner()
    state = create_train_state(model, params, partitioner)
    return trainer.Trainer(model, state, partitioner, KEY, 1, **settings)


@functools.cache
def compiled(model, parts):
    return jax.jit(lambda *given: gradients(model, *given, None, parts)[0])


def gradient(model, params, made, parts=1):
    trainable, frozen = split(params, model.labels, trainable_labels(model, params))
    return compiled(model, parts)(trainable, frozen, made)["prompt"]


def step(running, made):
    made = {name: np.asarray(value) for name, value in made.items()}
    running.train(made)
    return running.state.trainable["prompt"]


def test_rows_without_examples_are_held():
    model = tiny_lanes.model()
    running = started(model)
    before = jax.tree.map(np.asarray, running.state.trainable["prompt"])
    for _ in range(2):
        after = jax.tree.map(np.asarray, step(running, batch([1, 1, 1, 1])))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[[0, 2]], new[[0, 2]])
        assert (old[1] != new[1]).any()


def test_microbatches_have_the_same_gradient():
    model = tiny_lanes.model()
    params, made = tiny_lanes.params(model), batch([0, 2, 1, 2])
    whole, parts = gradient(model, params, made), gradient(model, params, made, 2)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_failed_run_leaves_the_gradient_of_others():
    model = tiny_lanes.model(runs=APART)
    params, made = tiny_lanes.params(model), batch([0, 1, 2, 2])
    broken = {**params, "prompt": jax.tree.map(lambda x: x.at[1].set(jnp.nan), params["prompt"])}
    expected, found = gradient(model, params, made), gradient(model, broken, made)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one[jnp.array([0, 2])], other[jnp.array([0, 2])], atol=1e-6)


@pytest.mark.slow
def test_runs_of_one_job_equal_solo_runs():
    model = tiny_lanes.model(runs=APART, optimizer_def=RECIPE)
    params, made = tiny_lanes.params(model), batch([0, 1, 2])
    together = step(started(model, params), made)
    for row, task in enumerate(tiny_lanes.TASKS):
        prompt = tiny_lanes.method()
        alone = tiny_lanes.model(prompt, tasks=(task,), optimizer_def=RECIPE)
        own = jax.tree.map(lambda x, row=row: x[row : row + 1], params["prompt"])
        part = {name: value[row : row + 1] for name, value in made.items()}
        part["labels"] = part["labels"][:, : len(task.names)]
        part["task_ids"] = jnp.zeros(1, jnp.int32)
        solo = step(started(alone, {**params, "prompt": own}), part)
        for one, other in zip(jax.tree.leaves(solo), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(one[0], other[row], atol=2e-6)


@pytest.mark.slow
@pytest.mark.devices(2)
def test_runs_split_over_devices_match_one_device():
    names = ["pets_s1", "shapes_s1", "tags_s1", "pets_s2"]
    runs = Runs(["pets", "shapes", "tags", "pets"], names, "independent")
    model = tiny_lanes.model(runs=runs, optimizer_def=RECIPE)
    tree = tiny_lanes.params(model)

    def trained(**mesh):
        partitioner = PjitPartitioner(**mesh)
        params = jax.tree.map(jnp.array, tree)
        split_runs = not mesh
        state = create_train_state(model, params, partitioner, rows_by_run=split_runs)
        running = trainer.Trainer(model, state, partitioner, KEY, 1, rows_by_run=split_runs)
        for _ in range(3):
            after = step(running, batch([0, 0, 1, 1, 2, 2, 3, 3]))
        return jax.tree.map(np.asarray, after), running

    (alone, _), (found, running) = trained(devices=jax.devices()[:1]), trained()
    table = running.state.trainable["prompt"]["lane"]["table"]
    assert table.sharding.shard_shape(table.shape)[0] == 2
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(found), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_image_cache_refuses_lanes():
    with pytest.raises(ValueError, match="its prompts are inputs of the image encoder"):
        started(tiny_lanes.model(), image_cache=ImageCache(10_000))
