"""Image tasks from folders, tables and arrays, and their few-shot runs."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mpt_jax.data import image_preprocessors, preprocessors
from mpt_jax.data.classes import ClassVocabulary, classes_of, normalized
from mpt_jax.tasks import image_metrics, images, text_metrics
from mpt_jax.tasks.image_splits import Share, held_out
from tests.fixtures import picture_files
from tests.fixtures.gin_files import ROOT

pytestmark = pytest.mark.usefixtures("own_tasks")

CLASSES, SOLID = picture_files.CLASSES, picture_files.SOLID
rows, ids, decoded = picture_files.rows, picture_files.ids, picture_files.decoded


@pytest.fixture
def folder(tmp_path):
    return picture_files.write_classes(tmp_path / "root")


# --- Tasks ------------------------------------------------------------------------------------


def test_task_of_a_folder_yields_decoded_images_labels_and_stable_ids(folder):
    images.register("pets_here", images.FolderImages(folder))
    found = rows("pets_here")
    assert [set(x) for x in found] == [{"image", "targets", "task_ids", "example_names"}] * 20
    assert [decoded(x).shape for x in found[:5]] == [(h, 5, 3) for h in (3, 4, 5, 6, 3)]
    for example, label in zip(found, [0] * 4 + [1] * 6 + [2] * 10, strict=True):
        assert example["targets"].tolist() == [label] and example["targets"].dtype == np.int32
        np.testing.assert_array_equal(
            np.unique(decoded(example).reshape(-1, 3), axis=0), [SOLID[CLASSES[label]]]
        )
        assert example["task_ids"].tolist() == [preprocessors.task_id("pets_here")]
    names = [x["example_names"].item() for x in found]
    assert names[:2] == [b"cat/00.png", b"cat/01.png"] and len(set(names)) == 20
    # FarmHash of the name; the numbers must never change, because caches and seeds depend on them.
    numbers = image_preprocessors.example_id(tf.constant(names[:2])).numpy()
    assert numbers.tolist() == [22885716, 500890326]
    classes = classes_of(seqio.TaskRegistry.get("pets_here"))
    assert classes.names == ("cat", "dog", "red fox") and not classes.multi_label
    assert classes.texts() == [f"a photo of a {x}." for x in classes.names]


def test_folder_with_splits_reads_each_split_and_renames_them(folder, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(folder, tmp_path / "splits" / split)
    source = images.FolderImages(tmp_path / "splits", with_splits=True)
    images.register("split_pets", source, {"red_fox": "fox"})
    assert source.splits == ("train", "validation")
    assert ids("split_pets", "validation")[0] == "val/cat/00.png"
    assert classes_of(seqio.TaskRegistry.get("split_pets")).names == ("cat", "dog", "fox")


def test_registration_reads_no_data_and_missing_folder_fails_at_first_use(tmp_path):
    images.register("nowhere", images.FolderImages(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent does not exist. Correct the path"):
        rows("nowhere")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        _ = classes_of(seqio.TaskRegistry.get("nowhere")).names


def test_table_of_files_reads_labels_splits_and_several_classes(folder, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text(
        "file,label,split\ncat/00.png,cat|dog,train\ndog/01.png,,train\nred_fox/02.png,fox,test\n"
    )
    source = images.TableImages(table, folder, multi_label=True)
    images.register("tags", source)
    assert [x["targets"].tolist() for x in rows("tags")] == [[0, 1], []]
    assert [x["targets"].tolist() for x in rows("tags", "test")] == [[2]]
    assert classes_of(seqio.TaskRegistry.get("tags")).multi_label
    lines = [
        {"file": f"{c}/{i:02}.png", "label": c, "split": s}
        for i, s in enumerate(("train", "dev"))
        for c in ("cat", "dog")
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    source = images.TableImages(tmp_path / "list.jsonl", folder, classes=("dog", "cat"))
    images.register("lines", source)
    assert [x["targets"].tolist() for x in rows("lines", "validation")] == [[1], [0]]


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_arrays_in_memory_and_in_npz_files_are_read_without_loss(channels, tmp_path):
    shape = (7, 6, 5) if channels is None else (7, 6, 5, channels)
    pictures = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    labels = np.array([0, 1, 1, 0, 2, 2, 1])
    np.savez(tmp_path / "x.npz", train_images=pictures, train_labels=labels)
    for name, data in (("memory", {"train": (pictures, labels)}), ("npz", tmp_path / "x.npz")):
        images.register(name, images.ArrayImages(data, ("zero", "one", "two")))
        found = rows(name)
        expected = np.broadcast_to(pictures.reshape(7, 6, 5, -1), (7, 6, 5, 3))
        np.testing.assert_array_equal([decoded(x) for x in found], expected)
        assert [x["targets"].item() for x in found] == labels.tolist()
        assert ids(name)[:2] == ["train/0", "train/1"]


def test_arrays_of_booleans_have_several_labels():
    data = {
        "train": (np.zeros((3, 2, 2, 3), np.uint8), np.eye(3, dtype=bool) | [True, False, True])
    }
    images.register("several", images.ArrayImages(data, "abc", multi_label=True))
    assert [x["targets"].tolist() for x in rows("several")] == [[0, 2], [0, 1, 2], [0, 2]]


def test_tasks_with_different_classes_can_be_mixed(folder):
    images.register("three_classes", images.FolderImages(folder))
    shutil.copytree(folder, folder.parent / "less")
    shutil.rmtree(folder.parent / "less" / "cat")
    images.register("two_classes", images.FolderImages(folder.parent / "less"))
    mixture = seqio.Mixture("mixed_images", ["three_classes", "two_classes"], default_rate=1.0)
    mixed = mixture.get_dataset(None, "train", shuffle=False, num_epochs=None, seed=0)
    found = mixed.take(200).as_numpy_iterator()
    kinds = {(x["task_ids"].item(), x["targets"].item(), decoded(x)[0, 0].argmax()) for x in found}
    three, two = (preprocessors.task_id(x) for x in ("three_classes", "two_classes"))
    assert kinds == {(three, 0, 0), (three, 1, 1), (three, 2, 2), (two, 0, 1), (two, 1, 2)}
    with pytest.raises(ValueError, match="'mixed_images' is a mixture"):
        classes_of(mixture)


def test_function_source_of_the_user_needs_all_class_names():
    def read(split, shuffle_files, seed=None):
        png = tf.io.encode_png(tf.zeros([2, 2, 3], tf.uint8))
        return tf.data.Dataset.from_tensors({"image": png, "labels": [1], "id": "only"})

    source = seqio.FunctionDataSource(read, splits=["train"])
    images.register("mine", source, ("dark", "light"))
    (example,) = rows("mine")
    assert example["targets"].tolist() == [1] and decoded(example).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="FunctionDataSource, which cannot be divided"):
        images.register("mine_too", source)


def test_metrics_are_found_by_name_and_read_the_scores_of_own_classes(folder):
    images.register("scored", images.FolderImages(folder), metric_fns=tuple(images.METRICS))
    task = seqio.TaskRegistry.get("scored")
    assert len(task.score_metric_fns) == 6 and not task.predict_metric_fns
    # The fourth score is of another task's class, and would be the highest.
    scores = np.array([[3.0, 1.0, 0.0, 9.0], [0.0, 1.0, 3.0, 9.0], [0.0, 3.0, 1.0, 9.0]])
    found = task.score_metric_fns[0]([0, 2, 2], scores)
    assert found == {"accuracy": pytest.approx(200 / 3)}
    for name, fn in zip(images.METRICS, task.score_metric_fns, strict=True):
        assert text_metrics.value_names(fn) == (name,)
        if name != "roc_auc":  # which needs two classes
            found = fn([0, 2, 2], scores)
            assert found == fn([0, 2, 2], scores[:, :3]) and name in found


@pytest.mark.parametrize("name", ["accuracy", "mean_per_class", "roc_auc", "calibration_error"])
def test_metrics_of_one_class_are_refused_for_several(name):
    data = {"train": (np.zeros((3, 2, 2, 3), np.uint8), np.eye(3, dtype=bool))}
    source = images.ArrayImages(data, "abc", multi_label=True)
    with pytest.raises(ValueError, match=f"the metric '{name}' needs one class per example"):
        images.register("tags_metric", source, metric_fns=("map", name))
    images.register("tags_metric", source)
    (metric,) = seqio.TaskRegistry.get("tags_metric").score_metric_fns
    assert metric([[1, 0, 0], [0, 1, 0]], -np.ones((2, 4)))["map_11point"] == 50


def test_functions_get_the_scores_of_own_classes(folder):
    seen = {}

    def with_scores(targets, scores):
        seen["scores"] = np.shape(scores)
        return {"size": 1.0}

    def with_predictions(targets, predictions):
        seen["predictions"] = predictions
        return {"hits": 1.0}

    fns = (with_scores, with_predictions, image_metrics.f1_at(0.5))
    images.register("own_fns", images.FolderImages(folder), metric_fns=fns)
    task = seqio.TaskRegistry.get("own_fns")
    scores = np.log([[0.6, 0.1, 0.1, 0.9], [0.2, 0.2, 0.7, 0.9]])
    scored, f1 = task.score_metric_fns
    assert scored([0, 2], scores) == {"size": 1.0} and seen["scores"] == (2, 3)
    assert f1(np.eye(3, dtype=int)[[0, 2]], scores)["of1"] == 100
    task.predict_metric_fns[0]([0, 2], ["a", "b"])
    assert seen["predictions"] == ["a", "b"]
    assert text_metrics.value_names(f1) == ("of1", "cf1_mean_of_f1", "cf1_of_means")


# --- Class names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "at least two names"),
        (("cat",), "at least two names"),
        ("ab", "at least two names"),
        (("cat", " dog"), "' dog' is empty, not text, or has extra white space"),
        (("cat", ""), "'' is empty"),
        (("cat", "a_b"), "'a_b' has an underscore"),
        (("Red Fox", "red-fox"), "'Red Fox' and 'red-fox' are the same after normalization"),
        (("cat", "dog", "cat"), "'cat' and 'cat' are the same"),  # one object, as literals are
    ],
)
def test_class_names_are_checked(names, words):
    with pytest.raises(ValueError, match=words):
        _ = ClassVocabulary(names, ("{}",)).names


@pytest.mark.parametrize("templates", [(), "a {}", ("a photo",), ("{} and {}",)])
def test_templates_are_checked(templates):
    with pytest.raises(ValueError, match="[Tt]emplate"):
        ClassVocabulary(("a", "b"), templates)


def test_class_digest_covers_names_templates_and_kind():
    def digest(names=("a", "b"), templates=("{}",), multi=False):
        return ClassVocabulary(names, templates, multi).digest

    content = json.dumps([["a", "b"], ["{}"], False])
    assert digest() == hashlib.sha256(content.encode()).hexdigest()
    others = {digest(("b", "a")), digest(templates=("a {}",)), digest(multi=True), digest()}
    assert len(others) == 4
    vocabulary = ClassVocabulary(lambda: ["a", "b"], ("{}",))
    assert vocabulary.digest == digest()
    assert vocabulary == ClassVocabulary(("a", "c"), ("{}",)) != seqio.PassThroughVocabulary(2)
    assert vocabulary.decode_tf(tf.constant([[1, 0], [0, 0]])).numpy().tolist() == [
        b"b, a",
        b"a, a",
    ]
    assert vocabulary.vocab_size == 2 and normalized("Yin_Yang  (x)") == "yin yang x"


def test_class_names_of_a_sequence_are_matched_by_name(folder):
    images.register("named", images.FolderImages(folder), ("Red Fox", "Dog", "Cat"))
    assert classes_of(seqio.TaskRegistry.get("named")).names == ("Cat", "Dog", "Red Fox")
    images.register("lacking", images.FolderImages(folder), ("Red Fox", "Dog"))
    with pytest.raises(ValueError, match="no name for the class 'cat'"):
        _ = classes_of(seqio.TaskRegistry.get("lacking")).names
    images.register("many", images.FolderImages(folder), ("red fox", "dog", "cat", "cow"))
    with pytest.raises(ValueError, match="has 4 names.*3 classes; not among them: 'cow'"):
        _ = classes_of(seqio.TaskRegistry.get("many")).names
    images.register("wrong", images.FolderImages(folder), {"cow": "a cow"})
    with pytest.raises(ValueError, match="'cow', which .* lacks"):
        _ = classes_of(seqio.TaskRegistry.get("wrong")).names


# --- Splits -----------------------------------------------------------------------------------


def test_shares_divide_each_class_and_do_not_depend_on_the_order(folder):
    images.register("divided", images.FolderImages(folder), shares=(0.5, 0.2, 0.3))
    source = seqio.TaskRegistry.get("divided").source
    counts = {
        split: [len(x) for x in source.index(split).rows_of_classes().values()]
        for split in source.splits
    }
    # Of 4, 6 and 10: bounds 2, 3 (2.8); 3, 4 (4.2); 5, 7.
    assert counts == {"train": [2, 3, 5], "validation": [1, 1, 2], "test": [1, 2, 3]}
    parts = {split: source.index(split).ids for split in source.splits}
    assert sorted(sum(parts.values(), ())) == sorted(source.source.index("train").ids)
    order = sorted(
        (f"red_fox/{i:02}.png" for i in range(10)),
        key=lambda x: hashlib.blake2b(f"divided/42/{x}".encode(), digest_size=16).digest(),
    )
    assert sorted(x for x in parts["train"] if "fox" in x) == sorted(order[:5])
    assert sorted(x for x in parts["test"] if "fox" in x) == sorted(order[7:])
    for split, expected in parts.items():
        assert ids("divided", split) == list(expected)


def test_held_out_share_and_pooled_splits_cover_each_image_once(folder, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "two" / split)
    base = images.FolderImages(tmp_path / "two", with_splits=True)
    source = images.DividedImages(base, held_out(0.2), "two")
    assert [source.num_rows(x) for x in source.splits] == [16, 4, 20]
    assert not set(source.index("train").ids) & set(source.index("validation").ids)
    pooled = images.DividedImages(base, images.pooled("train", "test"), "two")
    found = [x for split in pooled.splits for x in pooled.index(split).ids]
    assert sorted(found) == sorted(base.index("train").ids + base.index("test").ids)
    read = [x["id"].decode() for x in pooled.get_dataset("train").as_numpy_iterator()]
    assert read == list(pooled.index("train").ids) and {x.split("/")[0] for x in read} == {
        "train",
        "test",
    }
    empty = images.DividedImages(base, {"train": Share(("train",), 0.0, 0.01)}, "two")
    with pytest.raises(ValueError, match="train split of two would be empty"):
        empty.index("train")
    with pytest.raises(ValueError, match="not three numbers"):
        images.pooled("train", shares=(0.5, 0.6, 0.2))


# --- Hostile input ----------------------------------------------------------------------------


def test_bad_rows_of_a_table_are_listed_with_count_and_reasons(folder, tmp_path):
    table = tmp_path / "bad.csv"
    (folder / "cat" / "empty.png").write_bytes(b"")
    (folder / "cat" / "text.png").write_bytes(b"hello")
    bad = [
        "../x.png,cat",
        "/etc/passwd,cat",
        "cat/99.png,cat",
        "cat/00.png,cow",
        "cat/empty.png,cat",
        "cat/text.png,cat",
        ",cat",
        "cat/00.png,",
    ]
    table.write_text("file,label\ncat/01.png,cat\ndog/01.png,dog\n" + "\n".join(bad) + "\n")
    images.register("bad", images.TableImages(table, folder, classes=("cat", "dog")))
    with pytest.raises(ValueError) as error:
        rows("bad")
    message = str(error.value)
    assert message.startswith(f"{table}: 8 of 10 rows cannot be used: ")
    assert "unknown label 'cow'" in message and "and 3 more" in message
    assert message.endswith("or pass skip_broken=8 to leave them out.")
    source = images.TableImages(table, folder, classes=("cat", "dog"), skip_broken=8)
    images.register("skipped", source)
    assert ids("skipped") == ["cat/01.png", "dog/01.png"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("file,label\n", "has 0 different labels in 0 rows"),
        ("", "has 0 different labels in 0 rows"),
        ("name,label\na,b\n", "no column 'file'"),
        ("file,label\ncat/00.png,a\ncat/00.png,b\n", "1 of 2 .*cat/00.png .listed in an earlier"),
        (
            "file,label,split\ncat/00.png,a,train\ncat//./00.png,a,test\n",
            "1 of 2 rows cannot be used: cat//./00.png .listed in an earlier row",
        ),
        ("file,label,split\ncat/00.png,a,other\n", "split 'other' is not train"),
        ("file,label,file\ncat/00.png,a,b\n", "repeats the columns file"),
    ],
)
def test_unusable_table_fails_with_a_sentence(lines, words, folder, tmp_path):
    (tmp_path / "x.csv").write_text(lines)
    images.register("unusable", images.TableImages(tmp_path / "x.csv", folder))
    with pytest.raises(ValueError, match=words):
        seqio.TaskRegistry.get("unusable").source.index("train")


def test_table_of_another_kind_or_place_fails(tmp_path):
    for name, error in (("x.xls", ValueError), ("x.csv", FileNotFoundError)):
        with pytest.raises(error, match="x\\."):
            images.TableImages(tmp_path / name).index("train")


def test_class_without_an_image_fails(folder, tmp_path):
    (folder / "emu").mkdir()
    with pytest.raises(ValueError, match="1 of 4 classes have no image: emu"):
        images.FolderImages(folder).index("train")
    with pytest.raises(ValueError, match="has no folder train, validation or test"):
        images.FolderImages(folder, with_splits=True).index("train")
    with pytest.raises(ValueError, match="has 0 folders of classes"):
        images.FolderImages(folder / "cat").index("train")


def test_folders_that_are_not_one_split_each_fail(folder, tmp_path):
    def fails(message):
        with pytest.raises(ValueError, match=message):
            images.FolderImages(root, with_splits=True).index("train")

    root = tmp_path / "splits"
    for split in ("train", "val"):
        shutil.copytree(folder, root / split)
    (root / "validation").mkdir()
    fails("the folders val and validation are both the validation split. Merge them")
    (root / "validation").rename(root / "unlabeled")
    fails("1 of its folders are not splits: unlabeled. Rename them")
    (root / "unlabeled").rmdir()
    (root / "val" / "cat").rename(root / "val" / "Cat")
    fails("the train split lacks 1 of 4 classes of the other splits: Cat. Rename or add")
    shutil.rmtree(root / "val" / "Cat")
    fails("the validation split lacks 1 of 3 classes of the other splits: cat. Rename or add")
    given = images.FolderImages(root, with_splits=True, classes=CLASSES)
    assert given.num_rows("validation") == 16


@pytest.mark.parametrize("suffix", ["webp", "tif", "TIFF", "ppm", "heic", "avif"])
def test_images_of_other_formats_are_not_skipped_silently(folder, suffix):
    (folder / "cat" / f"a.{suffix}").write_bytes((folder / "cat" / "00.png").read_bytes())
    (folder / "cat" / "notes.txt").write_text("x")
    (folder / "cat" / "00.json").write_text("{}")
    message = rf"1 of 21 rows cannot be used: cat/a.{suffix} \(not a JPEG, PNG, GIF or BMP file\)"
    with pytest.raises(ValueError, match=message):
        images.FolderImages(folder).index("train")
    assert images.FolderImages(folder, skip_broken=1).num_rows("train") == 20


def test_shares_of_a_source_with_splits_fail_at_first_use(folder, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "two" / split)
    source = images.FolderImages(tmp_path / "two", with_splits=True)
    images.register("shared", source, shares=(0.5, 0.2, 0.3))
    with pytest.raises(ValueError, match="'shared' has shares=.* the splits train, test. Omit"):
        rows("shared", "test")
    shutil.rmtree(tmp_path / "two" / "train")
    images.register("one_shared", images.FolderImages(tmp_path / "two", True), shares=(0.5, 0, 0.5))
    with pytest.raises(ValueError, match="has the splits test. Omit"):
        rows("one_shared")


def _arrays(images_=None, labels=None, **changes):
    good = (np.zeros((2, 2, 2, 3), np.uint8), np.array([0, 1]))
    pair = (good[0] if images_ is None else images_, good[1] if labels is None else labels)
    return images.ArrayImages({"train": pair}, ("a", "b"), **changes)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (_arrays(np.zeros((2, 2, 2, 3))), r"images are float64 \[2, 2, 2, 3\], but uint8"),
        (_arrays(np.zeros((2, 2, 2, 4), np.uint8)), "but uint8"),
        (_arrays(np.zeros((2, 0, 2, 3), np.uint8)), "are empty"),
        (_arrays(labels=np.array([0, 2])), "1 of 2 labels are out of range, such as 2"),
        (_arrays(labels=np.array([0, -1])), "such as -1"),
        (_arrays(labels=np.array([0])), r"labels are int64 \[1\]"),
        (_arrays(labels=np.array([0.0, 1.0])), "but integers"),
        (_arrays(labels=np.array(["a", "b"])), "but integers"),
        (_arrays(labels=np.array([0, 0])), "1 of 2 classes have no image: b"),
        (_arrays(multi_label=True), "but booleans"),
        (images.ArrayImages({}, "ab"), "has the splits none"),
        (images.ArrayImages({"x": (1, 2)}, "ab"), "has the splits 'x'"),
    ],
)
def test_unusable_arrays_fail_with_a_sentence(source, words):
    with pytest.raises(ValueError, match=words):
        source.index("train")


def test_npz_files_are_never_unpickled_and_bounded(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez(path, train_images=np.array([{}], object), train_labels=np.array([0]))
    with pytest.raises(ValueError, match="train_images, is .*not a plain array of numbers"):
        images.ArrayImages(path, "ab").index("train")
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read as an NPZ file"):
        images.ArrayImages(path, "ab").index("train")
    np.savez_compressed(path, train_images=np.zeros((4, 9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match="lacks train_labels"):
        images.ArrayImages(path, "ab").index("train")
    monkeypatch.setattr("mpt_jax.tasks.image_arrays.MOST_BYTES", 100)
    with pytest.raises(ValueError, match="the limit is 100"):
        images.ArrayImages(path, "ab").index("train")
    with pytest.raises(FileNotFoundError):
        images.ArrayImages(tmp_path / "absent.npz", "ab").index("train")


def _hostile(kind):
    """Returns an NPZ file of less than 1 KB that does not hold what it declares."""
    npy, content = io.BytesIO(), io.BytesIO()
    np.save(npy, np.arange(64, dtype=np.uint8).reshape(1, 8, 8))
    images_ = npy.getvalue()
    if kind == "shape":  # 4 TiB
        images_ = images_.replace(b"(1, 8, 8), }" + b" " * 10, b"(4398046511104,), }   ")
        assert len(images_) == len(npy.getvalue()) and b"4398046511104" in images_
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", images_)
        archive.writestr("train_labels.npy", b"")
    file = bytearray(content.getvalue())
    start = 30 + len("train_images.npy")  # of the compressed bytes
    if kind == "stream":
        file[start : start + 8] = b"\xff" * 8
    if kind == "encrypted":
        for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            file[file.index(mark) + place] |= 1
    if kind == "offset":
        file[-6:-2] = b"\xff" * 4
    return bytes(file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "shape",
            r"train_images, is truncated.*its shape \(4398046511104,\) needs .* but it has 64",
        ),
        ("stream", "cannot be read as an NPZ file: .*decompressing"),
        ("encrypted", "cannot be read as an NPZ file: .*encrypted"),
        ("offset", "cannot be read as an NPZ file: "),
    ],
)
def test_hostile_npz_files_fail_with_a_sentence_before_allocation(kind, message, tmp_path):
    content = _hostile(kind)
    assert len(content) < 1024
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        images.ArrayImages(tmp_path / "x.npz", "ab").index("train")


def test_names_and_settings_that_clash_fail_at_registration(folder):
    source = images.FolderImages(folder)
    images.register("taken", source)
    with pytest.raises(ValueError, match="'taken' is already registered"):
        images.register("taken", source)
    with pytest.raises(ValueError, match="Unknown image metric 'f1'"):
        images.register("unknown_metric", source, metric_fns=("f1",))
    with pytest.raises(ValueError, match="Pass multi_label to the source only"):
        images.register("kinds", source, multi_label=True)
    with pytest.raises(ValueError, match="skip_broken=-1 is negative"):
        images.FolderImages(folder, skip_broken=-1).index("train")


# --- Documentation ----------------------------------------------------------------------------


def test_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    for name in ("black_footed_albatross", "house_wren"):
        for i in range(20):
            path = tmp_path / "birds" / name / f"{i}.jpg"
            picture_files.write(path, (10 * i, 0, 99), (8, 9))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "image-tasks.md").read_text()
    scope: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(block, scope)
    first = tmp_path / "birds" / ids("birds_k5_per_class_s1")[0]
    assert capsys.readouterr().out.splitlines() == [
        "('black-footed albatross', 'house wren')",
        f"{len(first.read_bytes())} [{int('wren' in first.parent.name)}]",
    ]
    sizes = [seqio.TaskRegistry.get("birds").source.num_rows(s) for s in ("train", "validation")]
    assert sizes == [20, 8] and len(ids("birds_published")) == 10


def test_scores_of_a_failed_run_count_as_zero(folder, caplog):
    """Its NaN scores must not end the evaluation of the other runs of a fleet."""
    images.register("imt_failed", images.FolderImages(folder), metric_fns=["accuracy", "map"])
    failed = np.full((4, 9), np.nan, np.float32)
    with caplog.at_level("WARNING", logger="absl"):
        fns = seqio.TaskRegistry.get("imt_failed").score_metric_fns
        found = [fn([0, 1, 0, 1], failed) for fn in fns]
    assert found == [
        {"accuracy": 0.0, "accuracy_undefined": 1.0},
        {"map": 0.0, "map_undefined": 1.0},
    ]
    message = "accuracy of imt_failed is undefined, because a score of 4 of 4 examples is NaN. It"
    assert message in caplog.text
