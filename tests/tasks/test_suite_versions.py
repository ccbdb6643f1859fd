"""Task versions registered on demand: without a prefix, and with synthetic labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mpt_jax.core import runs
from mpt_jax.data import task_lookup
from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import suite
from tests.fixtures import tfds_data
from tests.fixtures.suite_rows import GENERATED, ROWS, TEXTS

CLASSIFICATION = [name for name, row in ROWS.items() if row.words]


def made(name: str, row_name: str) -> Any:
    """Returns the task's text of row 1 of its data set, before tokenization."""
    row, reads = tfds_data.DATA[ROWS[row_name].data][1](1), ROWS[row_name].reads
    row = {key: row[key] for key in reads or row}
    dataset = tf.data.Dataset.from_tensors(tf.nest.map_structure(tf.constant, row))
    steps = list(task_lookup.find_task(name).preprocessors)
    for step in steps[: steps.index(seqio.preprocessors.tokenize)]:
        dataset = step(dataset)
    return next(iter(dataset.as_numpy_iterator()))


@pytest.mark.parametrize("name", ROWS)
def test_unprefixed_version_differs_only_in_prefix(name):
    usual, bare = made(name, name), made(f"{name}_unprefixed", name)
    assert usual.pop("inputs").decode() == TEXTS[name][0]
    assert f"{name} {bare.pop('inputs').decode()}" == TEXTS[name][0]
    assert bare.keys() == usual.keys()
    for key in usual:  # targets, and features for metrics
        np.testing.assert_array_equal(bare[key], usual[key])


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_synthetic_version_labels_derive_from_words(name):
    task, words = task_lookup.find_task(f"{name}_synthetic"), ROWS[name].words
    labels = evaluator.labels_of(task)
    assert len(set(labels)) == len(words) and not set(labels) & set(words)
    assert [len(label) for label in labels] == [len(word) for word in words]
    row = made(task.name, name)
    assert row["inputs"].decode() == TEXTS[name][0]
    assert row["targets"].decode() == labels[words.index(TEXTS[name][1])]
    found = {}
    for metric in task.metric_fns:
        found.update(metric([labels[0], labels[1]], [labels[0], words[1]]))
    assert found["accuracy"] == found["invalid"] == 50.0


def test_synthetic_word_by_hand():
    assert suite.synthetic_word("entailment") == "ipveomnipv"
    assert suite.synthetic_word("not_duplicate") == "puv_faqmodevi"
    assert (suite.synthetic_word("True"), suite.synthetic_word("choice1")) == ("Vsai", "djuodi1")
    assert suite.synthetic_word("Sci/Tech zu") == "Tdo/Vidj ba"


def test_repeat_run_of_synthetic_version_keeps_labels():
    repeat = task_lookup.find_task("rte_synthetic_s2")
    assert evaluator.labels_of(repeat) == ("ipveomnipv", "puv_ipveomnipv")


@pytest.mark.parametrize(
    "name", ["squad_synthetic", "stsb_synthetic", "toy_rte_unprefixed", "unprefixed", "rte_bare"]
)
def test_find_task_unknown_version_raises(name):
    with pytest.raises(ValueError, match=f"Unknown task '{name}'"):
        task_lookup.find_task(name)


@pytest.mark.parametrize("name", [*ROWS, *GENERATED])
def test_unprefixed_version_of_every_task_registers(name):
    version = f"{name}_unprefixed"
    assert task_lookup.find_task(version).source.data == {**ROWS, **GENERATED}[name].data
    assert runs.data_name(version) == version  # not parsed as a setting of a fleet
