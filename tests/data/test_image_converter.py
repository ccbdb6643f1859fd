"""Conversion of the examples of image tasks into the batch contract of images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from mpt_jax.core.runs import Runs
from mpt_jax.data import datasets, iterators
from mpt_jax.data.dataset_iterator import plain_message
from mpt_jax.data.image_transforms import ImageTransform
from mpt_jax.data.loss_batches import eval_batches
from mpt_jax.data.preprocessors import task_id
from mpt_jax.data.sampling import EqualQuotas, task_mixture
from mpt_jax.data.task_lookup import find_task
from mpt_jax.data.token_tables import PASS_NUMBERS
from tests.fixtures import image_files, image_jobs, memory_tasks, picture_files

SIZE = 12
TASKS = ("job_pets", "job_tags")
MAKE = image_jobs.converter(TASKS, SIZE)


def example(targets, task="job_pets", name="a.png", content=None):
    content = image_files.encoded(image_files.photo(20, 30), "PNG") if content is None else content
    return {
        "image": np.array([content], object),
        "targets": np.array(targets, np.int32),
        "task_ids": np.array([task_id(task)], np.int32),
        "example_names": np.array([name.encode()], object),
    }


def failure(*examples, make=MAKE):
    """The message of a conversion that must fail."""
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        image_jobs.converted(make, examples)
    return plain_message(caught.value)


def by_pillow(content, size=SIZE, mode="crop"):
    """Pillow's resizing of the shorter edge and the crop of the center, or of both edges."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    shorter = min(image.size)
    width, height = (size, size) if mode == "squash" else (x * size // shorter for x in image.size)
    # The width first; Pillow 13 may choose another order.
    for shape in ((width, image.height), (width, height)):
        image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image).astype(int)[top : top + size, left : left + size]


def test_shapes_and_types_are_the_batch_contract():
    (row,) = image_jobs.converted(MAKE, [example([1])])
    found = {name: (x.shape, x.dtype.name) for name, x in row.items()}
    assert found == {
        "image": ((SIZE, SIZE, 3), "uint8"),
        "task_ids": ((), "int32"),
        "label": ((), "int32"),
        "labels": ((4,), "float32"),
        "loss_weights": ((), "float32"),
        "example_ids": ((), "int32"),
    }
    assert found == {name: (shape, kind) for name, (shape, kind) in MAKE().feature_shapes().items()}
    lengths = {name: shape for name, (shape, _) in found.items()}
    assert MAKE().get_model_feature_lengths({}) == lengths
    single = image_jobs.converter(["job_pets", "job_shapes"], SIZE)
    (row,) = image_jobs.converted(single, [example([1])])
    assert "labels" not in row and row["label"] == 1


@pytest.mark.parametrize("mode", ["crop", "squash"])
@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_pixels_equal_pillow(mode, kind):
    """At most 2 of 255 levels and a mean of 0.3, for wide, tall, small and final sizes."""
    make = image_jobs.converter(TASKS, SIZE, mode=mode)
    sizes = [(20, 30), (41, 18), (5, 7), (SIZE, SIZE), (100, 12)]
    contents = [image_files.encoded(image_files.photo(*x), kind) for x in sizes]
    rows = image_jobs.converted(make, [example([0], content=x) for x in contents])
    for content, row in zip(contents, rows, strict=True):
        difference = np.abs(row["image"] - by_pillow(content, SIZE, mode))
        assert difference.max() <= 2 and difference.mean() <= 0.3


def test_jpeg_equals_pillow_within_decoder_rounding():
    """Decoders may differ by a level or two, which resizing averages."""
    content = image_files.encoded(image_files.photo(40, 60), "JPEG", quality=90)
    (row,) = image_jobs.converted(MAKE, [example([0], content=content)])
    difference = np.abs(row["image"] - by_pillow(content))
    assert difference.max() <= 3 and difference.mean() <= 0.3


def test_labels_rows_and_ids():
    given = [
        example([2], "job_pets", "one"),
        example([], "job_tags", "two"),
        example([3, 0], "job_tags", "three"),
    ]
    rows = image_jobs.converted(MAKE, given)
    assert [int(row["task_ids"]) for row in rows] == [0, 1, 1]
    assert [int(row["label"]) for row in rows] == [2, -1, -1]
    assert [row["labels"].tolist() for row in rows[1:]] == [[0, 0, 0, 0], [1, 0, 0, 1]]
    assert all(row["loss_weights"] == 1 for row in rows)
    names = ["one", "two", "three"]
    expected = tf.strings.to_hash_bucket_fast(names, 2**31).numpy().tolist()
    assert [int(row["example_ids"]) for row in rows] == expected
    assert len(set(expected)) == 3


def test_rows_are_runs_of_the_task_of_the_example():
    """Bank rows follow run names, whatever their order."""
    make = image_jobs.converter(TASKS[::-1], SIZE)
    rows = image_jobs.converted(make, [example([0], "job_pets"), example([1], "job_tags")])
    assert [int(row["task_ids"]) for row in rows] == [1, 0]
    assert [int(row["label"]) for row in rows] == [0, -1]


@pytest.mark.parametrize(
    ("targets", "task", "message"),
    [
        ([3], "job_pets", "[3], but its task has 3 classes."),
        ([-1], "job_pets", "[-1], but its task has 3 classes."),
        ([0, 1], "job_pets", "[0 1], but its task has 3 classes."),
        ([], "job_pets", "[], but its task has 3 classes."),
        ([1, 4], "job_tags", "[1 4], but its task has 4 classes."),
    ],
)
def test_wrong_classes_error_names_the_example(targets, task, message):
    assert failure(example(targets, task, "z/7.png")) == (
        f"Example z/7.png of {task} has the class ids {message} Correct the labels of the data."
    )


def test_batches_for_a_cache_have_files_and_names():
    make = lambda **settings: MAKE(decode=False, **settings)  # noqa: E731
    given = [example([1], name="a.png"), example([0, 2], "job_tags", "b.png")]
    plain, files = image_jobs.converted(MAKE, given), image_jobs.converted(make, given)
    for row, expected, raw in zip(files, plain, given, strict=True):
        assert row.pop("image_files") == raw["image"][0]
        name = raw["example_names"][0].decode()
        task = TASKS[int(row["task_ids"])]
        assert row.pop("image_names").decode() == f"example {name} of {task}"
        image = expected.pop("image")
        transform = ImageTransform(SIZE)
        np.testing.assert_array_equal(transform.of_file(raw["image"][0], "x"), image)
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(row[key], value)
    shapes = make().feature_shapes()
    assert shapes["image_files"] == shapes["image_names"] == ((), "string")
    assert "image" not in shapes
    augmented = image_jobs.converter(TASKS, SIZE, augmented=True)
    with pytest.raises(ValueError, match="augmented .AUGMENTATION., so they have to be decoded"):
        augmented(decode=False)


def test_corrupt_image_error_names_the_example():
    whole = image_files.encoded(image_files.photo(20, 30), "PNG")
    cases = {
        whole[:60]: "its PNG data is truncated or damaged",
        b"": "it is empty",
        b"RIFF1234WEBP": "it starts with the bytes 52 49 46 46, so it is not a JPEG",
    }
    for content, reason in cases.items():
        message = failure(example([0], name="b.png"), example([0], name="bad.png", content=content))
        assert message.startswith(
            f"The image of example bad.png of job_pets cannot be used: {reason}"
        )
        assert "example from the data." in message and "\n" not in message


def test_unknown_task_error_names_the_runs():
    assert failure(example([0], "job_shapes")) == (
        "The task job_shapes has no run in this job, whose runs are job_pets, job_tags. Add the "
        "name of the task to RUN_NAMES, or remove the task from the dataset."
    )
    unregistered = {**example([0]), "task_ids": np.array([5], np.int32)}
    assert failure(unregistered).startswith("The task with the unregistered id 5 has no run in")


def test_packing_and_texts_raise_with_a_remedy():
    with pytest.raises(
        ValueError, match=r"Images cannot be packed.* Drop --gin_file=gin/runs/pack"
    ):
        MAKE(pack=True)
    memory_tasks.register("cvt_text", memory_tasks.listed([("a", "b")]))
    texts = find_task("cvt_text").get_dataset({"inputs": 4, "targets": 4}, "train")
    message = "no feature 'example_names' .*so it is not of image tasks. Register the tasks"
    with pytest.raises(ValueError, match=message):
        MAKE()(texts, {})


# --- With augmentation -----------------------------------------------------------------------


def test_evaluation_examples_are_not_augmented():
    """The pass number, which only training examples have, decides."""
    plain, augmented = MAKE, image_jobs.converter(TASKS, SIZE, augmented=True)
    one = example([1])
    (expected,) = image_jobs.converted(plain, [one])
    (found,) = image_jobs.converted(augmented, [one])
    np.testing.assert_array_equal(found["image"], expected["image"])
    later = {**one, PASS_NUMBERS: np.array([0], np.int32)}
    (trained,) = image_jobs.converted(augmented, [later])
    assert (trained["image"] != expected["image"]).any()
    (found,) = image_jobs.converted(plain, [later])
    np.testing.assert_array_equal(found["image"], expected["image"])


def test_eval_batches_of_augmented_model_equal_pillow():
    augmented = image_jobs.converter(["job_pets"], SIZE, augmented=True)
    cfg = datasets.DatasetConfig("job_pets", {}, "validation", 4, shuffle=False, seed=0)
    batches = list(eval_batches(cfg, augmented)["job_pets"]())
    found = np.concatenate([batch["image"] for batch in batches])
    contents = [row["image"][0] for row in picture_files.rows("job_pets", "validation")]
    assert len(found) == 12 and len(contents) == 10
    for pixels, content in zip(found, contents, strict=False):
        assert np.abs(pixels - by_pillow(content)).max() <= 2
    weights = np.concatenate([batch["loss_weights"] for batch in batches])
    np.testing.assert_array_equal(weights, [1] * 10 + [0] * 2)
    assert not found[10:].any()


@pytest.mark.parametrize("tasks", [["job_pets"], pytest.param(list(TASKS), marks=pytest.mark.slow)])
def test_decoded_images_are_not_kept_in_memory(tasks):
    """An evaluation set of decoded images takes ten times the memory of its files."""
    make = image_jobs.converter(tasks, SIZE)
    data = task_mixture(tasks, EqualQuotas(8, 3)) if len(tasks) > 1 else tasks[0]
    cfg = datasets.DatasetConfig(data, {}, "validation", 4, shuffle=False, seed=0)
    assert cfg.use_memory_cache
    for batches in eval_batches(cfg, make).values():
        assert next(iter(batches())) is not next(iter(batches()))
    rows = tf.data.Dataset.from_tensor_slices({"encoder_input_tokens": np.zeros((8, 3), np.int32)})
    text = iterators.EvalBatches(rows, iterators.HostShard(4, 1, 0), keep=True)
    assert next(iter(text())) is next(iter(text()))


def test_runs_that_differ_only_in_settings_read_the_same_images():
    """A fleet: both runs of a task augment the same example in the same way."""
    names = ["job_pets_lr0.1", "job_pets_lr0.2"]
    runs = Runs(["job_pets"] * 2, names)
    make = image_jobs.converter(["job_pets"] * 2, SIZE, augmented=True, runs=runs)
    mixture = task_mixture(names, EqualQuotas(8, 3))
    cfg = datasets.DatasetConfig(mixture, {}, "train", 8, shuffle=True, seed=3)
    iterator = datasets.train_iterator(cfg, make)
    for batch in (next(iterator) for _ in range(8)):
        for name in ("image", "label", "example_ids"):
            np.testing.assert_array_equal(batch[name][:4], batch[name][4:])
        assert batch["task_ids"].tolist() == [0] * 4 + [1] * 4
