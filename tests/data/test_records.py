"""The record of a job's data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import seqio

from mpt_jax.data import records
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.tasks import few_shot, files, glue
from tests.fixtures import memory_tasks

assert few_shot and glue  # importing them registers tasks


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
