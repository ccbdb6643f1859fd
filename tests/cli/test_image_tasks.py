"""`mpt-jax tasks` for image tasks."""

from __future__ import annotations

import pytest
from PIL import Image

from mpt_jax.cli import registered_tasks, tasks
from mpt_jax.tasks import images
from mpt_jax.tasks.image_sets import coop, elevater, rows
from tests.fixtures import image_tfds_data, picture_files

assert elevater  # importing it registers tasks
pytestmark = pytest.mark.usefixtures("data_dir", "own_tasks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    for data in ("mnist:3.0.1", "eurosat/rgb:2.0.0"):
        image_tfds_data.write(path, data)
    return path


@pytest.fixture
def mine(tmp_path):
    picture_files.write_classes(tmp_path / "mine")
    images.register("mine", images.FolderImages(tmp_path / "mine"), templates=("a {}.", "the {}."))
    return tmp_path / "mine"


def cells(text: str) -> list[list[str]]:
    """The columns of every line of a plain table."""
    return [[cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines()]


def test_tasks_list_shows_classes_of_image_tasks(mine, capsys):
    names = ["mine", "elevater_mnist", "coop_eurosat", "coop_imagenet", "coop_ucf101"]
    registered_tasks.list_tasks({"some": names})
    _, headers, *lines = cells(capsys.readouterr().out)
    assert headers == ["task", "data set", "rows", "metrics", "classes", "here"]
    assert lines[:5] == [
        ["mine", str(mine), "train 20", "accuracy", "3", "yes"],
        [
            *("elevater_mnist", "mnist:3.0.1", "train 60,000, test 10,000", "accuracy", "10"),
            "yes; train has 30, published 60,000; test has 30, published 10,000",
        ],
        [
            *("coop_eurosat", "eurosat/rgb:2.0.0", "train 13,500, validation 5,400, test 8,100"),
            *("accuracy", "10", "yes; train has 30, published 27,000"),
        ],
        [
            *("coop_imagenet", "imagenet2012:5.1.0"),
            *("train 1,281,167, validation 50,000, test 50,000", "accuracy", "1,000", "no"),
        ],
        [
            *("coop_ucf101", "ucf101/list.csv", "train 7,639, validation 1,898, test 3,783"),
            *("accuracy", "101", "no"),
        ],
    ]


def test_tasks_list_missing_data_of_user_has_unknown_classes(tmp_path, capsys):
    images.register("gone", images.FolderImages(tmp_path / "gone"))
    registered_tasks.list_tasks({"some": ["gone"]})
    assert cells(capsys.readouterr().out)[2][-2:] == ["unknown", "no"]


def test_tasks_show_prints_classes_and_sizes_of_images(mine, capsys):
    tasks.main(["show", "mine_k2_per_class_s1", "-n", "4"])
    kinds, templates, title, headers, *lines = capsys.readouterr().out.splitlines()
    assert kinds == "3 classes: cat, dog, red fox"
    assert templates == "templates: a {}. | the {}."
    assert title.startswith("mine_k2_per_class_s1, train; metrics (the first selects the best ")
    assert headers.split("  ")[0] == "example"
    found = cells("\n".join(lines[:4]))
    for name, kind, size in found:
        with Image.open(mine / name) as image:
            assert size == f"{image.height} x {image.width}"
        assert kind == name.partition("/")[0].replace("_", " ")
    assert [x[0] for x in found] == picture_files.ids("mine_k2_per_class_s1")[:4]


def test_tasks_show_names_at_most_ten_classes(capsys):
    tasks.main(["show", "elevater_mnist", "-n", "1", "--split", "test"])
    assert capsys.readouterr().out.startswith("10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n")
    tasks.main(["show", "coop_eurosat", "-n", "1"])
    text = capsys.readouterr().out
    assert text.startswith("10 classes: Annual Crop Land, Forest, ") and "_0_" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coop_dtd"], "tfds build dtd:3.0.1"),
        (["coop_ucf101"], "ucf101/list.csv does not exist. Correct the path"),
        (["coop_imagenet"], "The class names of ImageNet are not in"),
        (["elevater_mnist", "--split", "validation"], "has no 'validation' split; it has train"),
        (["elevater_mnist", "--vocabulary", "byt5"], "--vocabulary=byt5 counts tokens of texts"),
    ],
)
def test_tasks_show_mistakes_print_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        tasks.main(["show", *arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    (line,) = [x for x in captured.err.splitlines() if "file_utils.py" not in x]
    assert message in line and not captured.out
    assert ("tfds build" in line) == (arguments[0] in ("coop_dtd", "coop_imagenet"))


def test_has_data_finds_listed_sets(tmp_path, monkeypatch):
    for name in ("MPT_JAX_IMAGES", "MPT_JAX_ROOT"):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert tasks.images_folder() == rows.root()
        monkeypatch.delenv(name)
    assert tasks.images_folder() == rows.root()
    monkeypatch.setenv("MPT_JAX_IMAGES", str(tmp_path))
    assert not tasks._has_data(str(tmp_path / "tfds"))
    (tmp_path / "ucf101").mkdir()
    (tmp_path / "ucf101" / "list.csv").touch()
    assert tasks._has_data(str(tmp_path / "tfds"))


def test_published_sizes_and_classes_cover_the_suites():
    listed = registered_tasks.published
    assert listed.sizes("coop_ucf101") == {"train": 7_639, "validation": 1_898, "test": 3_783}
    assert listed.sizes("elevater_fer2013")["test"] == 3_589
    assert listed.sizes("elevater_mnist") == {"train": 60_000, "test": 10_000}
    assert listed.sizes("mine") == {}
    assert sum(row.classes.number for row in coop.SETS) == 2_191
