"""Rows with missing or invalid gold stop a run with a clear error."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mpt_jax.core import runs
from mpt_jax.data import datasets, feature_converter, preprocessors, token_tables, vocabularies
from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import templates, text_metrics

LENGTHS = {"inputs": 60, "targets": 20}
WORDS = ("False", "True")
LABELLED = templates.labelled({"sentence": "sentence"}, WORDS)
SCORED = templates.similarity({"sentence": "sentence"})


def registered(name: str, gold: list, template, metrics=()) -> seqio.Task:
    def rows(split, shuffle_files, seed=None):
        texts = [f"sentence {i}" for i in range(len(gold))]
        return tf.data.Dataset.from_tensor_slices({"sentence": texts, "label": gold})

    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(rows, ["train", "test"]),
        preprocessors=[template(name), *preprocessors.finish(name)],
        output_features=preprocessors.output_features(vocabularies.load("byt5")),
        metric_fns=[text_metrics.of_task(name, metric) for metric in metrics],
    )


@pytest.mark.parametrize(
    ("name", "gold", "template", "message"),
    [
        ("gld_minus", [0, 1, -1], LABELLED, r"gld_minus: a row has the label -1, .*0 .. 1 \(Fal"),
        ("gld_two", [0, 2], LABELLED, r"gld_two: a row has the label 2, which is not in 0 .. 1"),
        ("gld_score", np.float32([1, -1]), SCORED, "gld_score: a row has the score -1.*0 .. 5"),
        ("gld_nan", np.float32([1, np.nan]), SCORED, "gld_nan: a row has the score nan"),
    ],
)
def test_example_table_invalid_gold_raises(name, gold, template, message):
    task = registered(name, gold, template)
    with pytest.raises(
        ValueError, match=f"'train' split of task '{name}' cannot be used: {message}"
    ):
        token_tables.ExampleTable(task, "train", LENGTHS, seed=0)


def test_example_table_valid_gold_is_read():
    table = token_tables.ExampleTable(registered("gld_fine", [1, 0], LABELLED), "train", LENGTHS, 0)
    assert table.num_examples == 2


def test_inference_evaluator_invalid_gold_raises():
    registered("gld_test", [1, -1], LABELLED, [text_metrics.accuracy])
    cfg = datasets.DatasetConfig("gld_test", LENGTHS, "test", 2, False, 0)
    converter = functools.partial(
        feature_converter.PromptFeatureConverter, prompt_length=2, runs=runs.Runs(["gld_test"])
    )
    with pytest.raises(ValueError, match="'test' split of task 'gld_test' cannot be used.*-1"):
        evaluator.InferenceEvaluator(cfg, converter, None)


def test_example_table_preprocessor_error_keeps_quotes():
    def refuse(name):
        def check(row):
            with tf.control_dependencies([tf.debugging.Assert(row["label"] > 5, ["it isn't 5"])]):
                return {"inputs": tf.identity(row["sentence"]), "targets": row["sentence"]}

        return lambda dataset: dataset.map(check)

    with pytest.raises(ValueError, match="cannot be used: it isn't 5$"):
        token_tables.ExampleTable(registered("gld_own", [1], refuse), "train", LENGTHS, seed=0)
