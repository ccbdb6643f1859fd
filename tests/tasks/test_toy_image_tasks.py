"""The toy image tasks: their registration, their labels, and which pairs they show."""

from __future__ import annotations

import numpy as np
import pytest
import seqio
import tensorflow as tf
from sklearn import datasets

from mpt_jax.data import task_lookup
from mpt_jax.data.classes import classes_of
from mpt_jax.tasks import toy_image_tasks as suite
from mpt_jax.tasks import toy_images as world
from tests.fixtures.processes import run_script

NAMES = sorted(suite.TASKS)


@pytest.fixture(scope="module")
def shown():
    """Task -> the scenes and styles of its validation split."""
    seen: dict[str, list] = {}
    original = world.draw

    def recording(scenes, rng, size=world.SIDE, style="filled"):
        seen[name].append((scenes, style))
        return original(scenes, rng, size, style)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "draw", recording)
        for name, task in suite.TASKS.items():
            seen[name] = []
            task.arrays("validation")
    return seen


@pytest.mark.slow
def test_import_registers_all_tasks_and_draws_nothing():
    script = """
import numpy as np
from mpt_jax.tasks import toy_images
def fail(*arguments, **settings): raise AssertionError("an image was drawn")
toy_images.draw = fail
from mpt_jax.tasks import toy_image_tasks
import seqio
from mpt_jax.data.classes import classes_of
assert set(toy_image_tasks.TASKS) <= set(seqio.TaskRegistry.names())
for name in toy_image_tasks.TASKS:
    task = seqio.TaskRegistry.get(name)
    assert classes_of(task).names and tuple(task.splits) == ("train", "validation", "test")
"""
    run_script(script)


def test_tasks_are_seven_sources_and_seven_targets_with_classes_templates_and_metrics():
    assert len(suite.SOURCE_TASKS) == len(suite.TARGET_TASKS) == 7 and len(suite.TASKS) == 14
    counts = {name: len(task.class_names) for name, task in suite.TASKS.items()}
    assert counts == {
        "toy_shape": 12,
        "toy_color": 10,
        "toy_texture": 6,
        "toy_shape_color": 24,
        "toy_size": 3,
        "toy_background": 6,
        "toy_count": 4,
        "toy_outline": 12,
        "toy_tint": 10,
        "toy_gray_texture": 6,
        "toy_position": 9,
        "toy_many": 12,
        "toy_compound": 24,
        "toy_digits": 10,
    }
    for name, task in suite.TASKS.items():
        registered = seqio.TaskRegistry.get(name)
        classes = classes_of(registered)
        assert classes.names == task.class_names and classes.templates == task.templates
        assert classes.multi_label == (name == "toy_many")
        (metric,) = registered.metric_fns
        assert metric.__name__ == ("map_11point" if name == "toy_many" else "accuracy")


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_equally_frequent_and_images_of_splits_differ(name):
    task = suite.TASKS[name]
    sizes = suite.DIGIT_SIZES if name == "toy_digits" else suite.SIZES
    drawn = {split: task.arrays(split) for split in ("validation", "test")}
    for split, (images, labels) in drawn.items():
        assert images.shape == (sizes[split], 32, 32, 3) and images.dtype == np.uint8
        if task.multi_label:
            assert labels.dtype == bool and set(labels.sum(1)) == {1, 2, 3, 4}
            assert labels.mean(0).min() > 0.1
            continue
        counts = np.bincount(labels, minlength=len(task.class_names))
        assert np.ptp(counts) <= (20 if name == "toy_digits" else 1)
    pixels = [image.tobytes() for images, _ in drawn.values() for image in images]
    assert len(set(pixels)) == len(pixels)
    np.testing.assert_array_equal(task.arrays("validation")[0], drawn["validation"][0])


def test_held_out_pairs_are_shown_in_toy_compound_only(shown):
    for name, calls in shown.items():
        for scenes, _ in calls:
            present = np.arange(world.MOST_OBJECTS) < scenes.counts[:, None]
            held_out = world.HELD_OUT[scenes.shapes, scenes.colors]
            assert held_out.all() if name == "toy_compound" else not held_out[present].any()


def test_labels_are_what_images_show(shown):
    for name, values in {
        "toy_shape": lambda x: x.shapes[:, 0],
        "toy_color": lambda x: x.colors[:, 0],
        "toy_texture": lambda x: x.textures,
        "toy_size": lambda x: x.sizes,
        "toy_background": lambda x: x.backgrounds,
        "toy_count": lambda x: x.counts - 1,
        "toy_outline": lambda x: x.shapes[:, 0],
        "toy_tint": lambda x: x.colors[:, 0],
        "toy_gray_texture": lambda x: x.textures,
        "toy_position": lambda x: x.positions,
    }.items():
        ((scenes, style),) = shown[name]
        styles = {"toy_outline": "outline", "toy_tint": "tinted"}
        assert style == styles.get(name, "filled")
        np.testing.assert_array_equal(values(scenes), suite.TASKS[name].arrays("validation")[1])
        if name != "toy_count":
            assert set(scenes.counts) == {1}
    for name in ("toy_shape_color", "toy_compound"):
        ((scenes, _),) = shown[name]
        labels = suite.TASKS[name].arrays("validation")[1]
        for shape, color, label in zip(
            scenes.shapes[:, 0], scenes.colors[:, 0], labels, strict=True
        ):
            text = f"{list(world.COLORS)[color]} {world.SHAPES[shape]}"
            assert suite.TASKS[name].class_names[label] == text
    ((scenes, _),) = shown["toy_many"]
    for row, count, labels in zip(
        scenes.shapes, scenes.counts, suite.TASKS["toy_many"].arrays("validation")[1], strict=True
    ):
        assert set(np.flatnonzero(labels)) == set(row[:count])
    ((scenes, _),) = shown["toy_gray_texture"]
    assert {list(world.COLORS)[x] for x in scenes.colors.ravel()} == {"gray"}
    assert set(scenes.backgrounds) == {0, 1}


def test_digits_are_those_of_scikit_learn():
    task, digits = suite.TASKS["toy_digits"], datasets.load_digits()
    parts = [task.arrays(split) for split in ("train", "validation", "test")]
    images = np.concatenate([x for x, _ in parts])
    np.testing.assert_array_equal(np.concatenate([x for _, x in parts]), digits.target)
    assert (images == images[..., :1]).all()
    small = images[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4)) / 255 * 16
    assert np.abs(small - digits.images).mean() < 1  # of 16 levels; cubic steps overshoot


def test_examples_and_few_shot_runs_are_read_through_seqio():
    task = task_lookup.find_task("toy_size")
    dataset = task.get_dataset(None, "validation", shuffle=False)
    images, labels = suite.TASKS["toy_size"].arrays("validation")
    for image, label, example in zip(images, labels, dataset.as_numpy_iterator(), strict=True):
        (encoded,) = example["image"]
        np.testing.assert_array_equal(tf.io.decode_png(encoded), image)
        assert example["targets"].tolist() == [label]
    few = task_lookup.find_task("toy_size_k5_per_class_s1").get_dataset(
        None, "train", shuffle=False
    )
    found = [int(x["targets"][0]) for x in few.as_numpy_iterator()]
    assert sorted(found) == [0] * 5 + [1] * 5 + [2] * 5
