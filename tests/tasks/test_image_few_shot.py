"""Few-shot runs of image tasks, and replay of written selections."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import seqio

from mpt_jax.data import preprocessors, task_lookup
from mpt_jax.data.classes import classes_of
from mpt_jax.tasks import image_few_shot, images
from mpt_jax.tasks.image_sources import Index
from mpt_jax.tasks.image_splits import _Places
from tests.fixtures import picture_files

pytestmark = pytest.mark.usefixtures("own_tasks")

CLASSES = picture_files.CLASSES
rows, ids = picture_files.rows, picture_files.ids


@pytest.fixture
def folder(tmp_path):
    return picture_files.write_classes(tmp_path / "root")


def test_few_shot_images_are_nested_and_those_of_the_stable_hash(folder):
    images.register("shots", images.FolderImages(folder))
    kept = {k: ids(f"shots_k{k}_per_class_s1") for k in (1, 3, 5)}
    assert [len(x) for x in kept.values()] == [3, 9, 14]  # cat has only 4
    assert set(kept[1]) <= set(kept[3]) <= set(kept[5])
    everything = [
        f"{c}/{i:02}.png" for c, n in zip(CLASSES, (4, 6, 10), strict=True) for i in range(n)
    ]

    def key(name, split="train"):
        return hashlib.blake2b(f"shots/{split}/{name}/1".encode(), digest_size=16).digest()

    ordered = sorted(everything, key=key)
    for k, found in kept.items():
        expected = [x for x in ordered if [y for y in ordered if y[:3] == x[:3]].index(x) < k]
        assert found == expected
    validation = ids("shots_k5_per_class_s1", "validation")
    left = sorted(set(everything) - set(kept[5]), key=lambda x: key(x, "validation"))
    expected = [x for x in left if [y for y in left if y[:3] == x[:3]].index(x) < 4]
    assert validation == expected and len(expected) == 1 + 4
    assert ids("shots_k3_s1") == ordered[:3]
    for k, size in ((3, 3), (6, 6), (15, 5)):  # in total, of the 20 - k images that are left
        left = sorted(set(everything) - set(ordered[:k]), key=lambda x: key(x, "validation"))
        assert ids(f"shots_k{k}_s1", "validation") == left[:size]
    assert len(ids("shots_k20_s1")) == 20
    with pytest.raises(ValueError, match="shots has 20 images .* shots_k21_s1 needs k = 21. Use"):
        ids("shots_k21_s1")
    assert ids("shots_k3_per_class_s2") != kept[3]


def test_few_shot_selection_does_not_depend_on_the_order_of_the_source(tmp_path, folder):
    listed = [
        (f"{c}/{i:02}.png", c) for c, n in zip(CLASSES, (4, 6, 10), strict=True) for i in range(n)
    ]
    found = []
    for name, order in (("forward", listed), ("backward", listed[::-1])):
        table = tmp_path / f"{name}.csv"
        table.write_text("file,label\n" + "".join(f"{a},{b}\n" for a, b in order))
        images.register(name, images.TableImages(table, folder), drawn_as="same")
        found.append([ids(f"{name}_k2_per_class_s0", x) for x in ("train", "validation")])
    assert found[0] == found[1]


def test_few_shot_run_keeps_classes_validation_and_marks_its_own_task(folder, tmp_path):
    for split in ("train", "val", "test"):
        shutil.copytree(folder, tmp_path / "three" / split)
    images.register("three", images.FolderImages(tmp_path / "three", with_splits=True))
    whole, cut = "three_k1_per_class_s0", "three_k1_per_class_s0_dev"
    assert (len(ids(whole)), len(ids(whole, "validation")), len(ids(whole, "test"))) == (3, 20, 20)
    assert (len(ids(cut)), len(ids(cut, "validation")), len(ids(cut, "test"))) == (3, 3, 20)
    assert len(ids("three_k6_per_class_s0_dev", "validation")) == 12  # at most 4 of each class
    assert len(ids("three_k6_s0_dev", "validation")) == 6
    assert len(ids("three_k20_s0_dev", "validation")) == 20
    run = seqio.TaskRegistry.get(whole)
    assert classes_of(run) is classes_of(seqio.TaskRegistry.get("three"))
    assert len(rows(run.name)) == 3
    assert {x["task_ids"].item() for x in rows(whole)} == {preprocessors.task_id(whole)}
    kept = task_lookup.few_shot_rows(run)["few_shot"][whole]
    assert [run.source.source.index("train").ids[i] for i in kept] == ids(whole)
    assert ids("three_k1_per_class_s0_lr0.3") == ids(whole)
    assert run.num_input_examples("train") == 3


def test_few_shot_images_of_several_classes_count_for_each(tmp_path):
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 0]], bool)
    data = {"train": (np.zeros((6, 2, 2, 3), np.uint8), labels)}
    images.register("tags_shots", images.ArrayImages(data, "abc", multi_label=True))
    for k in (1, 2):
        found = rows(f"tags_shots_k{k}_per_class_s0")
        counts = np.bincount([y for x in found for y in x["targets"]], minlength=3)
        assert (counts >= np.minimum(labels.sum(0), k)).all() and len(found) <= 3 * k
    assert set(ids("tags_shots_k1_per_class_s0")) <= set(ids("tags_shots_k2_per_class_s0"))


def test_index_file_is_written_and_replayed(folder, tmp_path):
    images.register("indexed", images.FolderImages(folder))
    images.write_index("indexed_k2_per_class_s1", tmp_path / "index.json")
    images.register_selection("indexed_again", "indexed", tmp_path / "index.json")
    for split in ("train", "validation"):
        assert ids("indexed_again", split) == ids("indexed_k2_per_class_s1", split)
    assert {x["task_ids"].item() for x in rows("indexed_again")} == {
        preprocessors.task_id("indexed_again")
    }
    record = json.loads((tmp_path / "index.json").read_text())
    record["splits"]["train"][0] = "cat/99.png"
    (tmp_path / "changed.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was changed after it was written"):
        images.read_index(tmp_path / "changed.json")
    record = image_few_shot.schema.sealed({**record, "splits": {"train": ["99.png"]}}, "sha256")
    (tmp_path / "other.json").write_text(json.dumps(record))
    images.register_selection("indexed_other", "indexed", tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"1 of 1 images are not in .*: 99.png"):
        rows("indexed_other")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"train": ["train/cat/00.png", "test/cat/00.png", "test/dog/00.png"]},
            "train: 2 of 3 images are in the test split of .*, which the file does not name, so .* "
            "Name test in the file too",
        ),
        (
            {"test": ["train/cat/00.png"]},
            "test: 1 of 1 images are in the train split .* Name train in the file too",
        ),
        (
            {"train": ["train/cat/00.png"], "test": ["test/cat/00.png", "train/cat/00.png"]},
            "test: 1 of 2 images are also in its train split, such as train/cat/00.png. Remove",
        ),
    ],
)
@pytest.mark.parametrize("read", ["train", "test"])
def test_selection_that_trains_on_images_of_another_split_fails(
    splits, message, read, folder, tmp_path
):
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "pair" / split)
    images.register("pair", images.FolderImages(tmp_path / "pair", with_splits=True))
    image_few_shot.seal_index(tmp_path / "index.json", "pair", splits)
    images.register_selection("pair_chosen", "pair", tmp_path / "index.json")
    with pytest.raises(ValueError, match=message):
        rows("pair_chosen", read)


def test_selection_may_move_images_between_splits_that_it_names(folder, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "pair" / split)
    images.register("moved", images.FolderImages(tmp_path / "pair", with_splits=True))
    splits = {"train": ["test/cat/00.png"], "test": ["train/cat/00.png"]}
    image_few_shot.seal_index(tmp_path / "index.json", "moved", splits)
    images.register_selection("moved_chosen", "moved", tmp_path / "index.json")
    assert ids("moved_chosen") == splits["train"] and ids("moved_chosen", "test") == splits["test"]


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"version": 1}', '{"version": 2, "task": "a", "splits": {}, "sha256": ""}'],
)
def test_damaged_index_file_fails_with_a_sentence(content, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match="The index file .*write_index"):
        images.read_index(tmp_path / "index.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        images.read_index(tmp_path / "absent.json")


def test_ids_that_differ_in_case_only_are_ambiguous_unless_exact():
    found = _Places({"train": Index(("a/X.png", "a/x.png", "b/Y.png"), ((0,), (0,), (1,)))})
    expected = {
        **{"a/X.png": ("train", 0), "a/x.png": ("train", 1), "b/y.PNG": ("train", 2)},
        **dict.fromkeys(["A/x.png", "x.png", "top/A/X.png"]),
    }
    assert {name: found.find(name) for name in expected} == expected
    # An id of several splits is that of the first, whatever is left out of it.
    both = _Places({x: Index(("a/x.png",), ((0,),)) for x in ("test", "train")})
    for name in ("a/x.png", "A/X.png", "x.png", "top/a/x.png"):
        assert both.find(name) == ("test", 0)


def test_end_of_an_id_names_an_image_if_it_is_unique(folder, tmp_path):
    record = {"version": 1, "task": "ends", "splits": {"train": ["09.png", "cat/00.png"]}}
    sealed = image_few_shot.schema.sealed(record, "sha256")
    (tmp_path / "index.json").write_text(json.dumps(sealed))
    images.register("ends", images.FolderImages(folder))
    images.register_selection("ends_published", "ends", tmp_path / "index.json")
    assert ids("ends_published") == ["red_fox/09.png", "cat/00.png"]
