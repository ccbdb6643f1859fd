"""Tasks of the base classes and of the new classes of an image task, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import seqio
from sklearn import metrics as sklearn_metrics

from mpt_jax.data import preprocessors, task_lookup
from mpt_jax.data.classes import classes_of
from mpt_jax.data.task_lookup import find_task
from mpt_jax.tasks import images
from tests.fixtures import picture_files

pytestmark = pytest.mark.usefixtures("own_tasks")

NAMES = ("ant", "bee", "cat", "dog", "elk")
TEMPLATES = ("a photo of a {}.", "the {}.")
SIZE = 43


@pytest.fixture
def labels():
    """Registers `animals`, with train and test; returns the labels of each split."""
    rng = np.random.default_rng(0)
    data, found = {}, {}
    for split in ("train", "test"):
        found[split] = rng.permutation(np.arange(SIZE) % 5)
        data[split] = (rng.integers(0, 256, (SIZE, 4, 4, 3), dtype=np.uint8), found[split])
    metrics = ("mean_per_class", "calibration_error", first_class)
    source = images.ArrayImages(data, NAMES)
    images.register("animals", source, {"elk": "red elk"}, templates=TEMPLATES, metric_fns=metrics)
    return found


def first_class(targets, predictions):
    """A metric of the user, which reads no scores."""
    del predictions
    return {"first_class": float(np.mean(np.asarray(targets) == 0))}


def test_halves_have_the_classes_images_and_templates_of_the_task(labels):
    base, new = find_task("animals_base"), find_task("animals_new")
    assert classes_of(base).names == ("ant", "bee", "cat")  # ceil(5 / 2)
    assert classes_of(new).names == ("dog", "red elk")
    for task, first, last in ((base, 0, 3), (new, 3, 5)):
        assert classes_of(task).templates == TEMPLATES
        assert tuple(task.splits) == ("train", "test")
        for split, whole in labels.items():
            rows = np.flatnonzero((whole >= first) & (whole < last))
            examples = list(task.get_dataset(None, split, shuffle=False).as_numpy_iterator())
            assert [x["example_names"].item().decode() for x in examples] == [
                f"{split}/{row}" for row in rows
            ]
            assert [x["targets"].item() for x in examples] == (whole[rows] - first).tolist()
            assert {x["task_ids"].item() for x in examples} == {preprocessors.task_id(task.name)}


def test_registration_reads_no_data(tmp_path):
    images.register("absent", images.FolderImages(tmp_path / "absent"))
    for name in ("absent_base", "absent_new_k2_per_class_s1"):
        assert task_lookup.is_task(name)
    with pytest.raises((ValueError, OSError), match="absent"):
        classes_of(find_task("absent_new")).names  # noqa: B018


def test_few_shot_runs_have_the_images_of_runs_of_the_task(labels):
    ids = {
        name: picture_files.ids(f"{name}_k3_per_class_s1")
        for name in ("animals", "animals_base", "animals_new")
    }
    assert len(ids["animals_base"]) == 9 and len(ids["animals_new"]) == 6
    label = dict(zip((f"train/{i}" for i in range(SIZE)), labels["train"], strict=True))
    assert ids["animals_base"] == [x for x in ids["animals"] if label[x] < 3]
    assert ids["animals_new"] == [x for x in ids["animals"] if label[x] >= 3]
    run = find_task("animals_new_k3_per_class_s1_lr0.1")
    assert classes_of(run).names == ("dog", "red elk")


def test_metrics_are_those_of_the_task_over_the_own_classes(labels):
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, 30)
    own = np.log(rng.dirichlet(np.ones(2), 30))
    # A larger task in the job: classes that do not exist have no probability.
    scores = np.concatenate([own, np.full((30, 5), -np.inf)], 1)
    share, recall, calibration = find_task("animals_new").metric_fns
    expected = sklearn_metrics.recall_score(targets, own.argmax(1), average="macro")
    assert recall(targets, scores)["mean_per_class"] == pytest.approx(100 * expected)
    alone = images.metric("calibration_error", classes_of(find_task("animals_new")))
    assert calibration(targets, scores) == alone(targets, own)
    assert share(targets, None) == {"first_class": np.mean(targets == 0)}
    names = [getattr(fn, "value_names", None) for fn in (recall, calibration)]
    assert names == [("mean_per_class",), ("calibration_error",)]


def test_halves_of_derived_tasks(labels, tmp_path):
    images.write_index("animals_k4_per_class_s1", tmp_path / "index.json")
    images.register_selection("published", "animals", tmp_path / "index.json")
    task = find_task("published_base")
    assert task.source.num_rows("train") == 12
    assert [fn.value_names for fn in task.metric_fns[1:]] == [
        ("mean_per_class",),
        ("calibration_error",),
    ]


def test_names_that_cannot_be_divided(labels):
    with pytest.raises(ValueError, match=r"before the draw, as in <task>_new_k16_per_class_s1"):
        find_task("animals_k2_per_class_s1_new")
    with pytest.raises(ValueError, match="animals_new_new would have 1 of the 2 classes"):
        classes_of(find_task("animals_new_new")).names  # noqa: B018
    data = {"train": (np.zeros((4, 4, 4, 3), np.uint8), np.eye(4, dtype=bool))}
    images.register("tags", images.ArrayImages(data, NAMES[:4], multi_label=True))
    with pytest.raises(ValueError, match="an image of tags may have classes of both halves"):
        find_task("tags_base")
    for name in ("_base", "nothing_base", "base"):
        with pytest.raises(ValueError, match="Unknown task"):
            find_task(name)
    source: Any = seqio.TextLineDataSource({"train": "absent"})
    seqio.TaskRegistry.add("words", source=source, output_features={})
    assert not task_lookup.is_task("words_base")
