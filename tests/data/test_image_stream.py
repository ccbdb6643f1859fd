"""The training stream of image tasks: passes, augmentation, and positions that can be restored."""

from __future__ import annotations

import collections
import functools
import io
import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf
from PIL import Image

from mpt_jax.data import datasets
from mpt_jax.data.image_transforms import Augmentation
from mpt_jax.data.sampling import EqualQuotas, PerExample, StochasticTasks, TaskMixture
from tests.fixtures import image_jobs, picture_files
from tests.fixtures.processes import run_script

SIZE, SEED = image_jobs.STREAM_SIZE, 7
TASKS = image_jobs.ARRAYS
COUNT = image_jobs.SIZES["train"]


iterator = image_jobs.train_iterator


def take(source, count):
    return list(itertools.islice(source, count))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], name)


@functools.cache
def files(task, split="train"):
    """{example id: (name, encoded file, class ids)} of a task."""
    rows = picture_files.rows(task, split)
    names = [row["example_names"][0] for row in rows]
    ids = tf.strings.to_hash_bucket_fast(names, 2**31).numpy().tolist()
    values = [(n, row["image"][0], row["targets"]) for n, row in zip(names, rows, strict=True)]
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, values, strict=True))


def rows_of(batches):
    """(task, example id, pixels) of each row, in order."""
    for batch in batches:
        for row, number, pixels in zip(
            batch["task_ids"], batch["example_ids"], batch["image"], strict=True
        ):
            yield TASKS[row], int(number), pixels


# --- Passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    [EqualQuotas(6, 3), StochasticTasks(8, 3), PerExample(8, 3)],
    ids=lambda s: str(type(s)),
)
def test_each_pass_is_a_permutation_with_its_pass_number(sampler):
    """In the stream itself, so the converter does not hide the pass numbers."""
    mixture = TaskMixture("ims_passes", TASKS, sampler)
    stream = mixture.get_dataset({}, split="train").take(240).as_numpy_iterator()
    seen = collections.defaultdict(list)
    for row in stream:
        name = row["example_names"][0]
        seen[int(row["task_ids"][0])].append((int(row["pass_numbers"][0]), name))
    assert len(seen) == 3
    orders = set()
    for found in seen.values():
        for first in range(0, len(found), COUNT):
            part = found[first : first + COUNT]
            assert {number for number, _ in part} == {first // COUNT}
            names = [name for _, name in part]
            assert len(set(names)) == len(names)
            if len(names) == COUNT:
                orders.add(tuple(names))
    assert len(orders) >= 3  # not the same permutation each time
    assert sum(len(found) > COUNT for found in seen.values()) == 3


def test_stream_without_shuffling_keeps_the_order_of_the_source():
    mixture = TaskMixture("ims_ordered", ("job_pets",), EqualQuotas(4, 3))
    stream = mixture.get_dataset({}, split="train", shuffle=False).take(COUNT + 2)
    rows = list(stream.as_numpy_iterator())
    names = picture_files.ids("job_pets")
    assert [row["example_names"][0].decode() for row in rows] == names + names[:2]
    assert [int(row["pass_numbers"][0]) for row in rows] == [0] * COUNT + [1] * 2


# --- Augmentation --------------------------------------------------------------------------------


def test_batches_equal_rederivation_from_seed_pass_and_name():
    """Pillow decodes the files, whose pass is counted here."""
    augmentation = Augmentation(SIZE)
    augmented = tf.function(
        lambda image, number, identity: augmentation(image, SEED, number, identity),
        input_signature=[tf.TensorSpec([20, 26, 3], tf.uint8), *[tf.TensorSpec([], tf.int64)] * 2],
    )
    seen = collections.Counter()
    for task, number, pixels in rows_of(take(iterator(), 26)):
        one_pass = seen[task] // COUNT
        seen[task] += 1
        name, content, _ = files(task)[number]
        image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        identity = tf.strings.to_hash_bucket_fast(name, 2**31)
        expected = augmented(image, one_pass, identity)
        np.testing.assert_array_equal(pixels, expected)
    assert min(seen.values()) > 2 * COUNT


@pytest.mark.parametrize("as_mixture", [False, True])
def test_augmentation_without_pass_numbers_fails(as_mixture):
    provider = seqio.Mixture("ims_plain", ["job_pets"], 1.0) if as_mixture else "job_pets"
    cfg = datasets.DatasetConfig(provider, {}, "train", 4, shuffle=True, seed=0)
    make = image_jobs.converter(["job_pets"], SIZE, augmented=True)
    with pytest.raises(ValueError, match=r"is not a TaskMixture.*MIXTURE_OR_TASK_NAME = @sampling"):
        datasets.train_iterator(cfg, make)
    datasets.train_iterator(cfg, image_jobs.converter(["job_pets"], SIZE))


def test_labels_stay_with_their_images():
    for batch in take(iterator(), 10):
        rows = zip(batch["task_ids"], batch["example_ids"], batch["label"], strict=True)
        for index, (row, number, label) in enumerate(rows):
            _, _, targets = files(TASKS[row])[int(number)]
            if TASKS[row] == "job_tags":
                assert label == -1
                assert np.flatnonzero(batch["labels"][index]).tolist() == targets.tolist()
            else:
                assert [label] == targets.tolist()


def test_passes_and_seeds_differ():
    def images(seed):
        found = collections.defaultdict(list)
        for task, number, pixels in rows_of(take(iterator(seed=seed), 24)):
            found[task, number].append(pixels)
        return found

    first, other = images(SEED), images(SEED + 1)
    assert all(len(found) == 2 for found in first.values())
    same_pass = sum((a == b).all() for a, b in first.values())
    same_seed = sum((first[key][0] == other[key][0]).all() for key in first)
    assert same_pass == same_seed == 0


def test_images_do_not_depend_on_the_batch_size_or_the_other_tasks():
    grouped = [row for row in rows_of(take(iterator(), 24)) if row[0] == "job_pets"]
    alone = list(rows_of(take(iterator(EqualQuotas(8, 3), ("job_pets",)), 6)))
    for one, other in zip(grouped, alone, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_array_equal(one[2], other[2])


@pytest.mark.parametrize(
    "sampler",
    [EqualQuotas(6, 3), pytest.param(StochasticTasks(6, 3), marks=pytest.mark.slow)],
    ids=["equal", "drawn"],
)
def test_any_number_of_hosts_same_images(sampler):
    whole = take(iterator(sampler), 6)
    hosts = [take(iterator(sampler, num_hosts=3, host_index=i), 6) for i in range(3)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]
    assert_same(joined, whole)


# --- Positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", [12, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 1, 11, 13))]
)
def test_restored_at_any_step_same_batches(step):
    """Steps 12 and 13 are at the end of a pass of each task."""
    first = iterator()
    take(first, step)
    state = first.state()
    expected = take(first, 14)
    second = iterator()
    second.restore(state)
    assert_same(take(second, 14), expected)
    first.restore(state)
    assert_same(take(first, 3), expected[:3])


def test_position_does_not_hold_the_prefetched_images():
    """Two batches of 32 images of 64 x 64 take 786 KB."""
    large = iterator(EqualQuotas(32, 3), TASKS[:2], size=64)
    take(large, 5)
    assert len(large.state()) < 10_000


def test_saving_a_position_changes_nothing():
    plain, saved = iterator(), iterator()
    expected = take(plain, 10)
    for number in range(10):
        saved.state()
        assert_same([next(saved)], [expected[number]])


@pytest.mark.slow
def test_position_restores_on_another_number_of_hosts():
    whole = iterator()
    coming = iter(take(whole, 6))
    hosts = [iterator(num_hosts=2, host_index=i) for i in range(2)]
    take(coming, 2)
    for host in hosts:
        take(host, 2)
    state = hosts[1].state()
    one = iterator()
    one.restore(state)
    assert_same(take(one, 4), take(coming, 4))


# Runs in a separate process, as after a preemption.
RESTORED = """
import sys, pathlib, numpy as np
from tests.fixtures import image_jobs
found = image_jobs.train_iterator()
found.restore(pathlib.Path(sys.argv[1]).read_bytes())
batches = [next(found) for _ in range(10)]
np.savez(sys.argv[2], **{f"{i}/{name}": x for i, b in enumerate(batches) for name, x in b.items()})
"""


@pytest.mark.slow
def test_position_restores_in_another_process(tmp_path):
    first = iterator()
    take(first, 5)
    (tmp_path / "state").write_bytes(first.state())
    expected = take(first, 10)
    run_script(RESTORED, tmp_path / "state", tmp_path / "found.npz")
    with np.load(tmp_path / "found.npz") as found:
        assert_same(
            [{name: found[f"{i}/{name}"] for name in expected[0]} for i in range(10)], expected
        )


def test_position_of_other_image_size_raises():
    state = iterator().state()
    with pytest.raises(ValueError, match=r"(?s)another configuration \(features.*12.*13"):
        iterator(size=SIZE + 1).restore(state)
