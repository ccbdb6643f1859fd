"""The record of a job's data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import seqio

from mpt_jax.checkpointing import fingerprint
from mpt_jax.data import records
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.tasks import few_shot, files, glue, images
from mpt_jax.tasks.image_sets import coop, elevater
from tests.fixtures import image_tfds_data, memory_tasks, picture_files

assert few_shot and glue and coop and elevater  # importing them registers tasks


@pytest.fixture(autouse=True)
def registry():
    before = seqio.TaskRegistry.names()
    yield
    for name in seqio.TaskRegistry.names() - before:
        seqio.TaskRegistry.remove(name)


def config(name: str, split: str = "train", **overrides) -> DatasetConfig:
    return DatasetConfig(name, None, split, 2, False, 0, **overrides)


@pytest.mark.usefixtures("byte_vocabulary")
def test_record_of_files_has_rows_digest_and_template(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("q,a\nnaïve,1\n  red ,0\n")
    Path("y.csv").write_text("q,a\nblue,0\n")
    files.register(
        "rec_files", train="x.csv", validation="y.csv", inputs="q: {q}", targets="{a}",
        labels={0: "no", 1: "yes"},
    )  # fmt: skip
    configs = [config("rec_files"), None, config("rec_files_k1_s3", "validation")]
    found = records.of_job(configs)
    lines = '["q: naïve", "yes"]\n["q:   red", "no"]\n'
    assert found["rec_files"] == {
        "source": "Files",
        "template": {
            "inputs": "q: {q}",
            "targets": "{a}",
            "labels": {"0": "no", "1": "yes"},
            "metrics": ["accuracy", "mean_f1", "invalid"],
        },
        "splits": {"train": {"rows": 2, "sha256": hashlib.sha256(lines.encode()).hexdigest()}},
    }
    dev = hashlib.sha256(b'["q: blue", "no"]\n').hexdigest()
    assert found["rec_files_k1_s3"]["splits"] == {"validation": {"rows": 1, "sha256": dev}}
    assert json.loads(json.dumps(found)) == found


def test_record_of_function_has_rows_and_nothing_of_this_process():
    memory_tasks.register_numbers("rec_numbers", lambda i: i, {"train": 3})
    found = records.of_job([config("rec_numbers"), config("rec_numbers", "validation")])
    assert found == {
        "rec_numbers": {"source": "FunctionDataSource", "splits": {"train": {"rows": 3}}}
    }
    cached = records.of_job([config("rec_numbers", use_cached=True)])
    assert cached["rec_numbers"]["splits"] == {"train": {"rows": None}}


def test_record_of_tfds_has_name_version_and_rows_without_reading(monkeypatch):
    source = seqio.TaskRegistry.get("rte").source
    monkeypatch.setattr(source, "num_rows", lambda split: 2490, raising=False)
    found = records.of_job([config("rte")])
    assert found == {"rte": {"source": source.data, "splits": {"train": {"rows": 2490}}}}
    assert source.data.startswith("glue/rte:")


# --- Images --------------------------------------------------------------------------------------


def image_record(name: str, split: str = "train") -> dict:
    return records.of_job([config(name, split)])[name]


def listed_sha256(*rows: tuple[str, int]) -> str:
    lines = "".join(json.dumps([name, [label]]) + "\n" for name, label in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def test_record_of_image_table_changes_with_label(tmp_path):
    picture_files.write_classes(tmp_path)
    table = tmp_path / "list.csv"
    found = []
    for label in ("cat", "dog"):
        table.write_text(f"file,label\ncat/00.png,{label}\ncat/01.png,cat\ndog/00.png,dog\n")
        name = f"rec_{label}"
        images.register(name, images.TableImages(table))
        found.append(image_record(name))
    rows = [("cat/00.png", 0), ("cat/01.png", 0), ("dog/00.png", 1)]
    assert found[0] == {
        "source": "TableImages",
        "splits": {"train": {"rows": 3, "sha256": listed_sha256(*rows)}},
    }
    rows[0] = ("cat/00.png", 1)
    assert found[1]["splits"]["train"]["sha256"] == listed_sha256(*rows)
    ours, saved = ({fingerprint.DATA: {"rec": record}} for record in found)
    with pytest.raises(ValueError, match="The data of the job in runs/x has changed.*sha256"):
        fingerprint._check_data(ours, saved, "runs/x")
    fingerprint._check_data(ours, ours, "runs/x")


def test_record_of_image_folder_does_not_depend_on_its_place(tmp_path):
    found = []
    for place in ("one", "two"):
        picture_files.write_classes(tmp_path / place)
        source = images.FolderImages(tmp_path / place)
        images.register(f"rec_{place}", source, shares=(0.5, 0.2, 0.3))
        images.register(f"rec_whole_{place}", source)
        found.append([image_record(f"rec_{place}"), image_record(f"rec_whole_{place}")])
    assert found[0][0]["source"] == found[0][1]["source"] == "FolderImages"
    assert found[0][1] == found[1][1]
    # A division depends on the name of the task, so its images differ.
    assert found[0][0]["splits"]["train"]["rows"] == 10
    assert found[0][0] != found[1][0]


def test_record_of_few_shot_images_is_of_their_source(tmp_path):
    picture_files.write_classes(tmp_path)
    images.register("rec_shots", images.FolderImages(tmp_path))
    whole = image_record("rec_shots")
    run = "rec_shots_k2_per_class_s1"
    assert image_record(run) == whole
    # Its validation images are drawn from train.
    assert image_record(run, "validation")["splits"] == {"validation": whole["splits"]["train"]}


def test_record_of_selection_changes_with_its_images(tmp_path):
    picture_files.write_classes(tmp_path / "root")
    images.register("rec_base", images.FolderImages(tmp_path / "root"))
    found = []
    for seed in (1, 2):
        images.write_index(f"rec_base_k2_per_class_s{seed}", tmp_path / f"{seed}.json")
        images.register_selection(f"rec_chosen{seed}", "rec_base", tmp_path / f"{seed}.json")
        found.append(image_record(f"rec_chosen{seed}"))
    assert [x["source"] for x in found] == ["FolderImages"] * 2
    one, two = (x["splits"]["train"] for x in found)
    assert one["rows"] == two["rows"] == 6 and one["sha256"] != two["sha256"]


def test_record_of_arrays_changes_with_pixels():
    found = []
    for value in (0, 1):
        pixels = np.full((4, 5, 6, 3), value, np.uint8)
        source = images.ArrayImages({"train": (pixels, np.array([0, 1, 0, 1]))}, ("no", "yes"))
        images.register(f"rec_array{value}", source)
        found.append(image_record(f"rec_array{value}")["splits"]["train"])
    assert found[0]["rows"] == 4 and found[0]["sha256"] != found[1]["sha256"]


def test_record_of_image_tfds_has_name_and_rows_without_reading(tmp_path, monkeypatch):
    for data in ("mnist:3.0.1", "eurosat/rgb:2.0.0"):
        image_tfds_data.write(tmp_path, data)
    seqio.set_tfds_data_dir_override(str(tmp_path))
    try:
        record = image_record("coop_eurosat")
        assert record == {"source": "eurosat/rgb:2.0.0", "splits": {"train": {"rows": 15}}}
        monkeypatch.setattr(images.TfdsImages, "read_index", None)
        record = image_record("elevater_mnist_k2_per_class_s1")
        assert record == {"source": "mnist:3.0.1", "splits": {"train": {"rows": 30}}}
    finally:
        seqio.set_tfds_data_dir_override(None)
