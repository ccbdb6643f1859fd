"""Sequences of tasks that divide the classes of a data set."""

from __future__ import annotations

import numpy as np
import pytest
import seqio

from mpt_jax.data.classes import classes_of
from mpt_jax.tasks import images, incremental

NAMES = ("ant", "bee", "cat", "dog", "eel")
ORDER = (3, 0, 4, 1, 2)


def source(multi_label, seed=0, size=40):
    rng = np.random.default_rng(seed)
    data = {}
    for split in ("train", "test"):
        labels = rng.random((size, 5)) < 0.3 if multi_label else rng.integers(0, 5, size)
        labels[:5] = np.eye(5, dtype=bool) if multi_label else np.arange(5)
        data[split] = (rng.integers(0, 256, (size, 4, 4, 3), dtype=np.uint8), labels)
    return images.ArrayImages(data, NAMES, multi_label), data


@pytest.fixture
def registered():
    """Registers a sequence, and removes its tasks after the test."""
    names = []

    def register(*args, **settings):
        names.extend(incremental.register(*args, splits=("train", "test"), **settings))
        return names

    yield register
    for name in names:
        seqio.TaskRegistry.remove(name)


def test_tasks_of_several_labels(registered):
    made, data = source(True)
    first, second = registered("animals", made, [2, 3], ORDER)
    assert (first, second) == ("animals_1", "animals_2")
    task = seqio.TaskRegistry.get(second)
    assert classes_of(task).names == ("eel", "bee", "cat")
    assert set(task.splits) == {"train", "test", "seen_2"}
    assert set(seqio.TaskRegistry.get(first).splits) == {"train", "test", "seen_1", "seen_2"}
    assert task.metric_fns[0].value_names[0] == "map"
    for split, base, wanted in [
        ("train", "train", ORDER[2:]), ("test", "test", ORDER[2:]), ("seen_2", "test", ORDER),
    ]:  # fmt: skip
        pixels, labels = data[base]
        rows = np.flatnonzero(labels[:, list(wanted)].any(1))
        examples = list(task.source.get_dataset(split).as_numpy_iterator())
        assert len(examples) == len(rows) == task.source.num_rows(split)
        index = task.source.index(split)
        for example, row, own, name in zip(examples, rows, index.labels, index.ids, strict=True):
            expected = np.flatnonzero(labels[row, list(ORDER[2:])])
            assert example["labels"].tolist() == list(own) == expected.tolist()
            assert example["id"].decode() == name == f"{base}/{row}"
    some = task.source.select("seen_2", [4, 1])
    full = list(task.source.get_dataset("seen_2").as_numpy_iterator())
    assert [x["id"] for x in some.as_numpy_iterator()] == [full[4]["id"], full[1]["id"]]


def test_images_without_an_own_class_have_no_label(registered):
    made, _ = source(True)
    first, _ = registered("animals", made, [2, 3], ORDER)
    index = seqio.TaskRegistry.get(first).source.index("seen_2")
    assert (
        () in index.labels and () not in seqio.TaskRegistry.get(first).source.index("test").labels
    )


def test_tasks_of_one_label_have_only_their_images(registered):
    made, data = source(False)
    names = registered("animals", made, [2, 3])
    tasks = [seqio.TaskRegistry.get(name) for name in names]
    assert [set(task.splits) for task in tasks] == [{"train", "test"}] * 2
    labels = [[x for (x,) in task.source.index("test").labels] for task in tasks]
    expected = data["test"][1]
    assert labels[0] == expected[expected < 2].tolist()
    assert labels[1] == (expected[expected >= 2] - 2).tolist()
    assert tasks[0].source.sha256("test") != tasks[1].source.sha256("test")


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((20, 0, 4), [4] * 5),
        ((20, 10, 2), [10] + [2] * 5),
        ((80, 40, 10), [40] + [10] * 4),
    ],
)
def test_published_protocols(arguments, sizes):
    assert incremental.task_sizes(*arguments) == sizes


def test_divisions_that_are_impossible():
    with pytest.raises(ValueError, match="20 classes cannot be divided .* 10 and tasks of 3"):
        incremental.task_sizes(20, 10, 3)
    made, _ = source(True)
    for sizes, order in [
        ([1, 4], None),
        ([2, 3], (0, 1, 2, 3)),
        ([2, 2], (0, 1, 1, 2)),
        ([], None),
    ]:
        with pytest.raises(ValueError, match="at least two classes"):
            incremental.register("bad", made, sizes, order)
    with pytest.raises(ValueError, match="has 5 classes, but class 6"):
        incremental.SomeClasses(made, [5, 6], {}).class_ids  # noqa: B018
