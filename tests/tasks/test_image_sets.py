"""The image suites, read from small data sets in the real format and in the documented layouts."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mpt_jax.data.classes import check_names, classes_of, normalized
from mpt_jax.tasks import image_tables, images
from mpt_jax.tasks.image_sets import class_names, coop, elevater, kitti, rows, templates, voc
from tests.fixtures import image_tfds_data, picture_files
from tests.fixtures.gin_files import ROOT

pytestmark = pytest.mark.usefixtures("data_dir", "own_tasks")

read, decoded = picture_files.rows, picture_files.decoded

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()

# Task -> the display names of classes 0, 1 and the last of TFDS, and images in each split.
WHOLE, TENTH = (30, 30, 30), (15, 6, 9)
TASKS = {
    "coop_caltech101": (("accordion", "airplane", "yin yang"), (30, 12, 18)),
    "coop_food101": (("apple pie", "baby back ribs", "waffles"), (30, 12, 18)),
    "coop_stanford_cars": (
        ("2000 AM General Hummer SUV", "2012 Acura RL Sedan", "2012 smart fortwo Convertible"),
        (24, 6, 30),
    ),
    "coop_oxford_pets": (
        ("abyssinian", "american bulldog", "yorkshire terrier"),
        (24, 6, 30),
    ),
    "coop_oxford_flowers": (
        ("pink primrose", "hard-leaved pocket orchid", "blackberry lily"),
        (45, 18, 27),
    ),
    "coop_sun397": (("abbey", "airplane cabin", "youth hostel"), (24, 6, 30)),
    "coop_dtd": (("banded", "blotchy", "zigzagged"), (45, 18, 27)),
    "coop_eurosat": (("Annual Crop Land", "Forest", "Sea or Lake"), TENTH),
    "elevater_cifar10": (("airplane", "automobile", "truck"), (30, 0, 30)),
    "elevater_cifar100": (("apple", "aquarium fish", "worm"), (30, 0, 30)),
    "elevater_mnist": (("0", "1", "9"), (30, 0, 30)),
    "elevater_oxford_flowers102": (
        ("pink primrose", "hard-leaved pocket orchid", "blackberry lily"),
        WHOLE,
    ),
    "elevater_oxford_pets": (("Abyssinian", "american bulldog", "yorkshire terrier"), (30, 0, 30)),
    "elevater_resisc45": (("airplane", "airport", "wetland"), (3, 3, 24)),
    "elevater_food101": (("apple pie", "baby back ribs", "waffles"), (30, 0, 30)),
    "elevater_stanford_cars": (
        ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"),
        (30, 0, 30),
    ),
    "elevater_caltech101": (("accordion", "airplane", "yin and yang symbol"), (30, 0, 30)),
    "elevater_dtd": (("banded", "blotchy", "zigzagged"), WHOLE),
    "elevater_patch_camelyon": (
        ("lymph node", "lymph node containing metastatic tumor tissue") * 2,
        WHOLE,
    ),
    "elevater_eurosat": (("annual crop land", "forest", "lake or sea"), (6, 6, 6)),
}
SETS = {row.name: row for row in (*coop.SETS, *elevater.SETS)}
# Sets that differ from the others in how they are read; the others are slow tests.
QUICK = "coop_eurosat elevater_cifar10 elevater_mnist elevater_food101".split()


def is_in_files(row: rows.ImageSet) -> bool:
    return isinstance(row.source, (images.FolderImages, images.TableImages))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds_images")
    for name in image_tfds_data.DATA:
        # Names of CIFAR are known when it is built; here in another order.
        image_tfds_data.write(path, name, CIFAR10[::-1] if name.startswith("cifar10:") else None)
    return path


# --- The tables -------------------------------------------------------------------------------


def test_suites_have_the_published_numbers_of_sets_and_classes():
    assert len(coop.SETS) == 11 and sum(row.classes.number for row in coop.SETS) == 2_191
    assert set(coop.SIZES) == set(templates.COOP) == {row.name[5:] for row in coop.SETS}
    published = [row for row in elevater.SETS if not row.name.endswith("_published")]
    assert len(published) == 20 and sum(row.classes.number for row in published) == 1_151
    assert set(elevater.SIZES) == set(templates.ELEVATER) == {row.name[9:] for row in published}
    assert set(SETS) <= seqio.TaskRegistry.names()


@pytest.mark.parametrize("name", [name for name in SETS if name != "coop_imagenet"])
def test_class_names_are_unique_words_in_the_vocabulary_of_the_task(name):
    vocabulary = classes_of(seqio.TaskRegistry.get(name))
    assert vocabulary.names == check_names(SETS[name].classes.names())
    assert len({normalized(x) for x in vocabulary.names}) == SETS[name].classes.number
    assert not any("_" in x or x != x.strip() for x in vocabulary.names)
    assert vocabulary.templates == tuple(SETS[name].templates)


def test_metrics_are_those_of_each_set():
    found = {row.name[9:]: tuple(row.metrics) for row in elevater.SETS[:20]}
    mean = {"caltech101", "fgvc_aircraft", "oxford_flowers102", "oxford_pets"}
    for name, metrics in found.items():
        expected = {"voc2007": ("map_11point",), "hateful_memes": ("roc_auc", "accuracy")}
        first = ("mean_per_class",) if name in mean else ("accuracy",)
        assert metrics == expected.get(name, first)


def test_numbers_of_templates():
    sizes = {name: len(texts) for name, texts in templates.ELEVATER.items()}
    several = {
        "gtsrb": 3, "cifar10": 18, "cifar100": 18, "caltech101": 34, "country211": 5,
        "fgvc_aircraft": 2, "resisc45": 18, "eurosat": 3, "stanford_cars": 8, "dtd": 8,
        "fer2013": 6,
    }  # fmt: skip
    assert sizes == {name: several.get(name, 1) for name in sizes}
    assert (len(templates.IMAGENET_80), len(templates.UCF101), len(templates.SUN397)) == (80, 48, 2)
    assert len(templates.IMAGENET_7) == 7 and len(templates.BIRDSNAP) == 1
    everything = [*templates.ELEVATER.values(), *templates.COOP.values(), templates.IMAGENET_80]
    everything += [templates.UCF101, templates.IMAGENET_7]
    for texts in everything:
        assert len(set(texts)) == len(texts)
        assert all(text.count("{}") == 1 and text == text.strip() for text in texts)
    # One of each ensemble, with the two articles.
    assert "a {} in a video game." in templates.CALTECH101
    assert "the embroidered {}." in templates.CALTECH101
    assert "a low contrast photo of the {}." in templates.CIFAR
    assert templates.RESISC45[::6] == (
        "satellite imagery of {}.", "satellite imagery of a {}.", "satellite imagery of the {}.",
    )  # fmt: skip
    assert templates.UCF101[-1] == "a demonstration of the person practicing {}."
    assert templates.IMAGENET_80[0] == "a bad photo of a {}."
    assert templates.IMAGENET_80[-1] == "a tattoo of the {}."


def test_importing_the_suites_touches_no_data(tmp_path, monkeypatch):
    monkeypatch.setenv(rows.VARIABLE, str(tmp_path / "absent"))
    assert rows.root() == str(tmp_path / "absent")
    seqio.set_tfds_data_dir_override(str(tmp_path / "none"))
    made = [*coop.sets(rows.root()), *elevater.sets(rows.root())]
    assert [row.name for row in made] == list(SETS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="tfds build dtd:3.0.1 --data_dir DIR"):
        SETS["coop_dtd"].source.index("train")


@pytest.mark.parametrize("name", [name for name, row in SETS.items() if not is_in_files(row)])
def test_sizes_of_splits_are_the_published_ones(name):
    """Compares sizes that need no data with those of the suites' documents."""
    prefix = coop.PREFIX if name.startswith(coop.PREFIX) else elevater.PREFIX
    sizes = (coop.SIZES if prefix == coop.PREFIX else elevater.SIZES).get(
        name.removeprefix(prefix).removesuffix("_published"), ()
    )
    source = SETS[name].source
    found = [
        source.num_input_examples(x) if x in source.splits else 0
        for x in ("train", "validation", "test")
    ]
    assert found == list(sizes)


@pytest.mark.parametrize("name", [name for name in SETS if not name.endswith("_published")])
def test_table_of_the_documentation_matches_the_suite(name):
    row, module = SETS[name], coop if name.startswith(coop.PREFIX) else elevater
    short = name.removeprefix(module.PREFIX)
    (line,) = re.findall(rf"^\| `{name}` .*$", (ROOT / "docs" / "image-tasks.md").read_text(), re.M)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    source = getattr(row.source, "source", row.source)
    place = {
        images.TableImages: f"{short}/list.csv",
        images.FolderImages: f"{short}/<split>/<class>",
    }
    assert cells[1] == f"`{place.get(type(source)) or source.data}`"
    sizes = ["-" if size == 0 else f"{size:,}" for size in module.SIZES[short]]
    assert cells[2:6] == [f"{row.classes.number:,}", *sizes]
    assert (cells[6] == "ours") == isinstance(row.source, images.DividedImages)
    assert cells[7] == ", ".join(row.metrics)


# --- TFDS -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in TASKS]
)
def test_images_of_tfds_have_the_label_of_their_class_and_the_split_sizes(name):
    names, sizes = TASKS[name]
    vocabulary = classes_of(seqio.TaskRegistry.get(name))
    source = seqio.TaskRegistry.get(name).source
    for split, size in zip(("train", "validation", "test"), sizes, strict=True):
        if not size:
            assert split not in source.splits
            continue
        found = read(name, split)
        assert len(found) == size == len({x["example_names"].item() for x in found})
        for example in found:
            gray = decoded(example).reshape(-1, 3).astype(int)
            assert np.ptp(gray, axis=0).max() <= 2  # one value, but for JPEG's rounding
            kind = int(np.abs(np.array(image_tfds_data.GRAYS) - gray.mean()).argmin())
            if name == "elevater_cifar10":  # whose names are in reverse order on disk
                kind = 2 - kind if kind != 1 else 3
                expected = (*names, "ship")[kind]
            else:
                expected = names[min(kind, 1)] if "camelyon" in name else names[kind]
            assert vocabulary.names[example["targets"].item()] == expected
        index = source.index(split)
        assert [x["targets"].tolist() for x in found] == [list(x) for x in index.labels]


def test_ids_of_tfds_do_not_depend_on_shards_except_those_of_mnist():
    without = {
        name
        for name, row in SETS.items()
        if isinstance(source := getattr(row.source, "source", row.source), images.TfdsImages)
        and not source.ids
    }
    assert without == {"elevater_mnist"}
    found = SETS["elevater_food101"].source.index("test").ids
    assert found[:2] == ("validation_0_0.jpg", "validation_1_0.jpg")


def test_coop_caltech_leaves_out_two_classes(tmp_path):
    source = SETS["coop_caltech101"].source.source
    dropped = {"background_google", "faces_easy"}
    assert not dropped & set(source.class_ids) and len(source.class_ids) == 100
    everything = images.TfdsImages(
        source.data, source.tfds_splits, source.sizes, ("yin_yang", "accordion"), ids=source.ids
    )
    assert everything.num_rows("train") == 20  # airplanes are left out
    first = next(everything.get_dataset("train").as_numpy_iterator())
    assert (first["id"], first["labels"].tolist()) == (b"accordion/train_0_0.jpg", [1])
    unknown = images.TfdsImages(source.data, source.tfds_splits, source.sizes, ("unicorn",))
    with pytest.raises(ValueError, match="has no class 'unicorn'; it has 102 classes"):
        unknown.index("train")


def test_imagenet_reads_its_names_from_the_file_of_the_user(tmp_path):
    ids = class_names.imagenet(str(tmp_path)).ids()
    (row,) = [row for row in coop.sets(str(tmp_path)) if row.name == "coop_imagenet"]
    seqio.TaskRegistry.remove("coop_imagenet")
    rows.register([row])
    task = seqio.TaskRegistry.get("coop_imagenet")
    assert [x["targets"].item() for x in read("coop_imagenet", "test")][:3] == [0, 1, 999]
    with pytest.raises(FileNotFoundError, match="Copy CoOp's classnames.txt there"):
        _ = classes_of(task).names
    (tmp_path / "imagenet").mkdir()
    file = tmp_path / "imagenet" / "classnames.txt"
    file.write_text("".join(f"{x} thing {i}\n" for i, x in enumerate(ids[:-1])))
    with pytest.raises(ValueError, match=f"no line for the class {ids[-1]}"):
        _ = classes_of(task).names
    # CoOp's file has these names twice.
    same = {
        **dict.fromkeys(("n04008634", "n03773504"), "missile"),
        **dict.fromkeys(("n04355933", "n04356056"), "sunglasses"),
    }
    assert set(same) < set(ids)
    file.write_text("".join(f"{x} {same.get(x, f'thing {i}')}\n" for i, x in enumerate(ids)))
    found = dict(zip(ids, classes_of(task).names, strict=True))
    assert list(found.values())[998:] == ["thing 998", "thing 999"]
    assert [found[x] for x in same] == ["projectile", "missile", "sunglass", "sunglasses"]


def test_few_shot_run_of_a_tfds_task_is_nested_and_has_validation():
    found = {k: read(f"elevater_mnist_k{k}_per_class_s0", "train") for k in (1, 5)}
    kept = {k: {x["example_names"].item() for x in rows} for k, rows in found.items()}
    assert (len(kept[1]), len(kept[5])) == (3, 15) and kept[1] < kept[5]
    validation = read("elevater_mnist_k5_per_class_s0", "validation")
    assert len(validation) == 12 and not kept[5] & {x["example_names"].item() for x in validation}


def test_published_split_is_replayed_with_images_of_tfds(tmp_path):
    split = {
        "train": [["banded/train_0_3.jpg", 0, "banded"], ["x/TEST_2_0.jpg", 46, "zigzagged"]],
        "val": [["banded/validation_1_1.jpg", 1, "blotchy"]],
        "test": [["test_0_0.jpg", 0, "banded"]],
    }
    (tmp_path / "split_zhou_DTD.json").write_text(json.dumps(split))
    image_tables.index_from_coop(tmp_path / "split_zhou_DTD.json", "elevater_dtd", tmp_path / "i")
    images.register_selection("dtd_zhou", "elevater_dtd", tmp_path / "i")
    labels = [[x["targets"].item() for x in read("dtd_zhou", s)] for s in ("train", "validation")]
    assert labels == [[0, 46], [1]]


# --- VOC and KITTI ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difficult", "expected"),
    [("negative", [[0], [1], []]), ("positive", [[0, 19], [1], [19]])],
)
def test_voc_has_several_labels_and_an_explicit_policy(difficult, expected):
    images.register("voc_here", voc.source(difficult))
    found = [x["targets"].tolist() for x in read("voc_here", "test")]
    assert found == expected * image_tfds_data.EACH
    assert classes_of(seqio.TaskRegistry.get("voc_here")).multi_label
    with pytest.raises(ValueError, match="difficult='maybe' is not a policy"):
        voc.source("maybe")


def test_voc_names_have_spaces_except_in_the_published_version():
    ours = classes_of(seqio.TaskRegistry.get("elevater_voc2007")).names
    published = classes_of(seqio.TaskRegistry.get("elevater_voc2007_published")).names
    differ = [(a, b) for a, b in zip(ours, published, strict=True) if a != b]
    assert differ == [
        ("dining table", "diningtable"),
        ("potted plant", "pottedplant"),
        ("tv monitor", "tvmonitor"),
    ]
    selected = [
        {x["example_names"].item() for x in read(f"{name}_k2_per_class_s1", "train")}
        for name in ("elevater_voc2007", "elevater_voc2007_published")
    ]
    assert selected[0] == selected[1]


def test_kitti_labels_are_the_distance_of_the_nearest_vehicle():
    found = [x["targets"].tolist() for x in read("elevater_kitti_distance", "validation")]
    assert found == [[0], [2], [3]] * image_tfds_data.EACH

    def label(*objects):
        types, z = zip(*objects, strict=True) if objects else ((), ())
        location = np.array([(0, 0, x) for x in z], np.float32).reshape(-1, 3)
        row = {"type": tf.constant(types, tf.int64), "location": tf.constant(location)}
        return kitti.distance_class({"objects": row}).numpy().tolist()

    assert [label((0, z)) for z in (-3, 8, 8.01, 20, 20.01, 999, 999.5)] == [
        [0], [0], [1], [1], [2], [2], [3],
    ]  # fmt: skip
    assert label() == [3] and label((3, 1.0), (7, 2.0)) == [3]
    assert label((2, 30.0), (1, 10.0), (5, 1.0)) == [1]


# --- Folders and tables -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The sets that TFDS does not have, with one image of each class in each split."""
    path = tmp_path_factory.mktemp("images")
    made = {row.name: row for row in (*elevater.sets(str(path)), *coop.sets(str(path)))}
    for row in made.values():
        if isinstance(row.source, images.FolderImages):
            for split in ("train", "valid", "test"):
                for name in row.classes.ids():
                    picture_files.write(row.source.root / split / name / "0.png", (9, 9, 9), (1, 1))
        elif isinstance(row.source, images.TableImages):
            picture_files.write(row.source.root / "one.png", (9, 9, 9), (1, 1))
            ids = row.classes.ids()
            lines = [(f"{i}.png", x, "train") for i, x in enumerate(ids)]
            lines.append(("one.png", ids[-1], "test"))
            for file, _, _ in lines[:-1]:
                picture_files.write(row.source.root / file, (9, 9, 9), (1, 1))
            image_tables.write(row.source.table, lines)
    return path


def test_sets_of_folders_and_tables_are_read_in_the_documented_layout(base):
    made = [*elevater.sets(str(base)), *coop.sets(str(base))]
    found = [row for row in made if is_in_files(row)]
    assert {row.name for row in found} == {
        "elevater_hateful_memes", "elevater_country211", "elevater_fgvc_aircraft",
        "elevater_rendered_sst2", "elevater_gtsrb", "elevater_fer2013", "coop_fgvc_aircraft",
        "coop_ucf101",
    }  # fmt: skip
    for row in found:
        seqio.TaskRegistry.remove(row.name)
        rows.register([row])
        task = seqio.TaskRegistry.get(row.name)
        number = row.classes.number
        assert [x["targets"].item() for x in read(row.name, "train")] == list(range(number))
        last = read(row.name, "test")[-1]
        assert last["targets"].item() == number - 1 and decoded(last).tolist() == [[[9, 9, 9]]]
        assert len(classes_of(task).names) == number


def test_folder_of_an_unknown_class_fails(base):
    (row,) = [r for r in elevater.sets(str(base)) if r.name == "elevater_rendered_sst2"]
    source = images.FolderImages(row.source.root, with_splits=True, classes=("positive", "neutral"))
    with pytest.raises(ValueError, match="1 of 2 folders are not classes: negative"):
        source.index("train")


# --- Converters -------------------------------------------------------------------------------


def test_converters_write_tables_that_are_read(tmp_path):
    (tmp_path / "coop.json").write_text(
        json.dumps({"train": [["a/0.jpg", 0, "Apply_Eye_Makeup"]], "val": [], "test": []})
    )
    image_tables.from_coop(tmp_path / "coop.json", tmp_path / "coop.csv")
    assert (
        tmp_path / "coop.csv"
    ).read_text() == "file,label,split\na/0.jpg,Apply_Eye_Makeup,train\n"
    (tmp_path / "train.txt").write_text("train_images.zip@1/a.jpg 1,0\n\nb.jpg 2\n")
    image_tables.from_elevater(
        {"train": tmp_path / "train.txt"}, tmp_path / "el.csv", ("x", "y", "z")
    )
    assert (tmp_path / "el.csv").read_text().splitlines()[1:] == [
        "train_images/1/a.jpg,y|x,train", "b.jpg,z,train",
    ]  # fmt: skip
    for name, line in (
        ("train", "0034309 737-200"),
        ("val", "1 F-16A/B"),
        ("test", "2 BAE 146-200"),
    ):
        (tmp_path / f"images_variant_{name}.txt").write_text(line + "\n")
    image_tables.from_aircraft(tmp_path, tmp_path / "air.csv")
    assert (tmp_path / "air.csv").read_text().splitlines()[1:] == [
        "images/0034309.jpg,737-200,train", "images/1.jpg,F-16A/B,validation",
        "images/2.jpg,BAE 146-200,test",
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text('{"id": 7, "img": "img/7.png", "label": 1, "text": "x"}\n')
    image_tables.from_hateful_memes({"test": tmp_path / "m.jsonl"}, tmp_path / "memes.csv")
    assert (tmp_path / "memes.csv").read_text().splitlines()[1:] == ["img/7.png,1,test"]


def test_fer2013_pixels_become_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 48)).astype(np.uint8)
    lines = [
        f"{label},{' '.join(map(str, image.ravel()))},{usage}"
        for label, image, usage in zip((3, 6), pixels, ("Training", "PublicTest"), strict=True)
    ]
    (tmp_path / "fer2013.csv").write_text("emotion,pixels,Usage\n" + "\n".join(lines) + "\n")
    image_tables.from_fer2013(tmp_path / "fer2013.csv", tmp_path / "fer")
    source = images.TableImages(tmp_path / "fer" / "list.csv")
    images.register("faces", source)
    for split, image in zip(("train", "validation"), pixels, strict=True):
        (example,) = read("faces", split)
        np.testing.assert_array_equal(decoded(example), np.repeat(image[..., None], 3, -1))
    (tmp_path / "fer2013.csv").write_text("emotion,pixels,Usage\n3,1 2 3,Training\n")
    with pytest.raises(ValueError, match="line 2: 3 pixels of usage 'Training' are not a FER-2013"):
        image_tables.from_fer2013(tmp_path / "fer2013.csv", tmp_path / "fer")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"train": [["a"]]}', '{"train": [["a", -1, "b"]]}', '{"rest": []}', "\xff"],
)
def test_damaged_split_file_fails_with_a_sentence(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'x.json'}")):
        image_tables.from_coop(tmp_path / "x.json", tmp_path / "x.csv")


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg 3", "a.jpg x", "a.jpg 1,", "a.jpg 99999999999"])
def test_damaged_elevater_index_fails_with_a_sentence(line, tmp_path):
    (tmp_path / "x.txt").write_text(line)
    with pytest.raises(ValueError, match="line 1: 'a.jpg.*is not a path and labels from 0 to 2"):
        image_tables.from_elevater({"train": tmp_path / "x.txt"}, tmp_path / "x.csv", "abc")
    for convert in (image_tables.from_coop, image_tables.from_fer2013):
        with pytest.raises((FileNotFoundError, ValueError), match="absent"):
            convert(tmp_path / "absent.csv", tmp_path / "x.csv")
