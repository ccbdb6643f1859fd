"""The classifier with lanes, compared with NumPy, and what a lane may not depend on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.backbones.clip.token_merging import merge_tokens
from mpt_jax.backbones.t5.scanned_params import stack_layers
from mpt_jax.core.runs import Runs
from mpt_jax.models.classifier import HeadObjective
from mpt_jax.prompts.init import Uniform
from mpt_jax.prompts.mpt import MPT
from mpt_jax.prompts.shared_prompt import SharedPrompt
from tests.fixtures import clip_models, reference_lanes, tiny_clip, tiny_lanes
from tests.fixtures.tiny_lanes import LAYERS, LENGTH, PETS, SELECTORS, SHAPES, TAGS

VIT = clip_models.tiny(**clip_models.VIT)
ROWS = [0, 1, 2, 1, 0]


def batch(rows=ROWS, seed=0):
    """Images of the three tasks, with labels."""
    rng = np.random.default_rng(seed)
    label = np.array([-1 if row == 2 else row for row in rows])
    labels = rng.integers(0, 2, (len(rows), 4)) * (label < 0)[:, None]
    made = tiny_clip.batch(rows, label.tolist(), seed)
    return {**made, "labels": jnp.asarray(labels, jnp.float32)}


def expected_logits(model, params, made, rows=None):
    """Logits of each example's own classes, one example at a time, in float64."""
    found, config = [], model.module.config
    lanes = model.prompt.lanes(params["prompt"], model.runs, jnp.arange(model.runs.num_rows))
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["prompt"]["head"])
    for image, row in zip(made["image"], rows or np.asarray(made["task_ids"]), strict=True):
        own = {name: np.asarray(x)[row] for name, x in lanes._asdict().items()}
        kept = model.prompt.drop_and_replace
        merged = model.prompt.merged_tokens
        x = reference_lanes.feature(
            config, params, image, **own, drop_and_replace=kept, merged=merged
        )
        x = x / np.linalg.norm(x) if model.normalize else x
        logits = (head["kernel"][row] @ x + head["bias"][row]) / model.temperature
        found.append(logits[: model.bank.count[row]])
    return found


def own_logits(model, params, made):
    """Logits of each example's own classes."""
    logits = np.asarray(jax.jit(model.own_logits)(params, made))
    counts = model.bank.count[np.asarray(made["task_ids"])]
    for row, count in zip(logits, counts, strict=True):
        assert np.isneginf(row[count:]).all() and np.isfinite(row[:count]).all()
    return [row[:count] for row, count in zip(logits, counts, strict=True)]


def assert_equal_logits(found, expected, atol=2e-5):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


SETTINGS = {
    "vit": {},
    "clip": {"config": clip_models.tiny()},
    "temperature": {"temperature": 0.1, "normalize": False},
    "summaries kept": {"prompt": tiny_lanes.method(drop_and_replace=False)},
    "no selectors": {"prompt": tiny_lanes.method(selectors=0)},
    "merged": {"prompt": tiny_lanes.method(selectors=0, merged_tokens=3)},
    "merged once": {
        "prompt": tiny_lanes.method(selectors=0, merged_tokens=6, drop_and_replace=False)
    },
    "no keys": {"prompt": tiny_lanes.method(layers=0)},
    "keys in all layers": {"prompt": tiny_lanes.method(layers=3)},
    "shared": {"prompt": tiny_lanes.method(SharedPrompt(11, Uniform(0.5)))},
    "mpt": {"prompt": tiny_lanes.method(MPT(11, 2, Uniform(0.5)))},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_equal_a_naive_numpy_pass(name):
    model = tiny_lanes.model(**SETTINGS[name])
    params, made = tiny_lanes.params(model), batch()
    assert set(params) == {"image_encoder", "prompt"}
    assert_equal_logits(own_logits(model, params, made), expected_logits(model, params, made))


@pytest.mark.parametrize("count", [1, 2, 5, 8, 15, 16, 17])
def test_merged_tokens_equal_a_loop(count):
    tokens = np.random.default_rng(count).normal(size=(17, 4)).astype(np.float32)
    found = jax.jit(merge_tokens, static_argnums=1)(jnp.asarray(tokens), count)
    np.testing.assert_allclose(found, reference_lanes.merge(tokens, count), atol=1e-6)


def test_scanned_layers_have_the_same_logits():
    model = tiny_lanes.model()
    params, made = tiny_lanes.params(model), batch()
    scanned = tiny_lanes.model(config=clip_models.tiny(**clip_models.VIT, scan_layers=True))
    stacked = stack_layers(params)
    found = jax.jit(scanned.own_logits)(stacked, made)
    np.testing.assert_allclose(found, jax.jit(model.own_logits)(params, made), atol=1e-5)


def test_without_selectors_images_are_not_seen():
    model = tiny_lanes.model(tiny_lanes.method(selectors=0))
    params = tiny_lanes.params(model)
    one, other = (own_logits(model, params, batch(seed=seed)) for seed in (0, 1))
    assert_equal_logits(one, other, 0)


def test_all_lanes_of_an_image():
    model = tiny_lanes.model()
    params, made = tiny_lanes.params(model), batch()
    found = np.asarray(jax.jit(model.seen_logits)(params, made))
    assert found.shape == (5, 3 + 2 + 4)
    every = [np.concatenate(expected_logits(model, params, {"image": [image] * 3}, [0, 1, 2]))
             for image in made["image"]]  # fmt: skip
    np.testing.assert_allclose(found, np.stack(every), atol=2e-5)
    apart = tiny_lanes.model(runs=Runs(["pets", "shapes", "tags"], groups=[0, 1, 0]))
    masked = np.asarray(jax.jit(apart.seen_logits)(params, made))
    other_group = np.array([group == 1 for group in [0, 0, 0, 1, 1, 0, 0, 0, 0]])
    of_shapes = np.array(ROWS) == 1
    assert (np.isneginf(masked) == (other_group != of_shapes[:, None])).all()
    np.testing.assert_array_equal(masked[0, :3], found[0, :3])


def test_a_lane_does_not_depend_on_other_lanes():
    made = batch([0, 0, 1, 1])
    few = tiny_lanes.model(tasks=(PETS, SHAPES), prompt=tiny_lanes.method())
    many = tiny_lanes.model()
    params = tiny_lanes.params(many)
    cut = {**params, "prompt": jax.tree.map(lambda x: x[:2], params["prompt"])}
    alone = jax.jit(few.own_logits)(cut, made)
    among = jax.jit(many.own_logits)(params, made)
    np.testing.assert_array_equal(np.asarray(alone)[:, :3], np.asarray(among)[:, :3])
    changed = {**params, "prompt": jax.tree.map(lambda x: x.at[2].add(1.0), params["prompt"])}
    np.testing.assert_array_equal(among, jax.jit(many.own_logits)(changed, made))


def test_gradients_equal_finite_differences_and_are_zero_for_absent_tasks():
    model = tiny_lanes.model(tiny_lanes.method(lane=None), tasks=tiny_lanes.TASKS)
    params, made = tiny_lanes.params(model), batch([0, 2, 2])

    @jax.jit
    def loss(prompt):
        return model.loss_sums({**params, "prompt": prompt}, made)[0]["cross_entropy"].sum()

    gradient = jax.jit(jax.grad(loss))(params["prompt"])
    assert all((x[1] == 0).all() for x in jax.tree.leaves(gradient))
    rng = np.random.default_rng(0)
    for name in range(4):
        direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
                                 params["prompt"])  # fmt: skip
        unit = 1 / np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(direction)))
        move = lambda h: jax.tree.map(lambda p, d: p + h * d, params["prompt"], direction)  # noqa: B023, E731
        step = 3e-2 * unit
        slope = (loss(move(step)) - loss(move(-step))) / (2 * step)
        along = sum(
            (g * d).sum() for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
        )
        np.testing.assert_allclose(
            slope * unit, along * unit, rtol=2e-2, atol=2e-4, err_msg=f"{name}"
        )


def test_backbone_has_no_gradient_and_selectors_have_one():
    model = tiny_lanes.model()
    params, made = tiny_lanes.params(model), batch()

    def loss(params):
        params = model.stop_frozen_gradients(params)
        return model.loss_sums(params, made)[0]["cross_entropy"].sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert all((x == 0).all() for x in jax.tree.leaves(gradient["image_encoder"]))
    table = np.abs(gradient["prompt"]["lane"]["table"])
    assert (table.max(-1) > 1e-7).all()  # of every selector, key and value of every lane


@pytest.mark.parametrize("every", [0, 20])
def test_losses_are_of_own_classes(every):
    model = tiny_lanes.model(objective=HeadObjective(all_classes=every))
    params, made = tiny_lanes.params(model), batch()
    made = {**made, "loss_weights": jnp.asarray([1, 1, 1, 0, 1.0])}
    sums, found = jax.jit(model.loss_sums)(params, made)
    expected = []
    for logits, row, label, labels in zip(
        expected_logits(model, params, made), ROWS, made["label"], made["labels"], strict=True
    ):
        if row == 2:
            target = np.asarray(labels)
            filled = np.concatenate([logits, np.zeros(max(every - 4, 0))])
            target = np.concatenate([target, np.zeros(max(every - 4, 0))])
            chance = 1 / (1 + np.exp(-filled))
            each = -np.log(np.where(target == 1, chance, 1 - chance))
            expected.append(each.mean())
        else:
            expected.append(np.log(np.exp(logits).sum()) - logits[int(label)])
    kept = np.array([1, 1, 1, 0, 1.0])
    np.testing.assert_allclose(sums["cross_entropy"], [(kept * expected).sum()], rtol=1e-5)
    np.testing.assert_allclose(model.loss_normalizers(made)["cross_entropy"], [4])
    np.testing.assert_allclose(found["loss"].sum[2], expected[2], rtol=1e-5)


def test_scores_are_probabilities_of_own_classes():
    model = tiny_lanes.model()
    params, made = tiny_lanes.params(model), batch()
    scores = np.asarray(jax.jit(model.score_batch)(params, made))
    logits = expected_logits(model, params, made)
    np.testing.assert_allclose(np.exp(scores[0, :3]).sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(scores[2], -np.log1p(np.exp(-logits[2])), atol=2e-5)
    best = np.asarray(jax.jit(model.predict_batch)(params, made))[:, 0]
    assert best.tolist() == [int(np.argmax(x)) for x in logits]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": tiny_lanes.method(classes=3)}, "A task has 4 classes, but .*num_classes is 3"),
        ({"objective": HeadObjective(all_classes=3)}, "all_classes is 3, but a task has 4"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        (
            {"prompt": tiny_lanes.method(selectors=0, merged_tokens=17)},
            "merged_tokens is 17, but an image has 16",
        ),
        ({"prompt": tiny_lanes.method(layers=4)}, "layers is 4, but the image tower has 3"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_lanes.model(**settings)


def test_class_names_are_compared_for_lanes_of_the_artifact_only():
    model = tiny_lanes.model()
    assert set(model.input_digests) - set(model.comparable_digests(Runs(["pets", "tags"]))) == {
        "class_names_of_shapes_sha256"
    }
    other = tiny_lanes.model(tasks=(PETS, SHAPES, tiny_lanes.TaskClasses(
        "tags", TAGS.names[::-1], multi_label=True)))  # fmt: skip
    name = "class_names_of_tags_sha256"
    assert other.input_digests[name] != model.input_digests[name]
    assert (SELECTORS, LENGTH, LAYERS) == (3, 2, 2)
