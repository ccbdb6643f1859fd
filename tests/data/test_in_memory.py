"""Texts encoded without SeqIO are what SeqIO makes of them, and need no graph for each task."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mpt_jax.core.runs import Runs
from mpt_jax.data import datasets, in_memory, preprocessors, token_tables, vocabularies
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.loss_batches import eval_batches
from mpt_jax.data.sampling import EqualQuotas, TaskMixture
from mpt_jax.evaluation import evaluator
from mpt_jax.runtime import paths
from mpt_jax.tasks import suite, text_metrics
from tests.fixtures import memory_tasks

# A repeated word, an unknown one, an empty text, and more tokens than a limit of 5 allows.
TEXTS = [
    ("the film was good .", "good"),
    ("zzz", "bad"),
    ("", "good"),
    ("good " * 9, "bad bad bad"),
]
NAMES = [f"pre_{number}" for number in range(4)]
VALIDATION = memory_tasks.listed(TEXTS, ("train", "validation"))


@pytest.fixture(scope="module", autouse=True)
def vocabulary():
    loaded = vocabularies.load(paths.shipped(name="toy.model"), 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "run_vocabulary", lambda: loaded)
        yield


@pytest.fixture
def tasks():
    for name in NAMES:
        seqio.TaskRegistry.remove(name)
        task = suite.RunTask(
            name,
            source=VALIDATION,
            output_features={},
            preprocessors=preprocessors.finish(name),
            metric_fns=[text_metrics.accuracy],
        )
        seqio.TaskRegistry.add_provider(name, task)
    yield [seqio.TaskRegistry.get(name) for name in NAMES]
    for name in NAMES:
        seqio.TaskRegistry.remove(name)


def rows(dataset):
    return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize(
    "limits", [None, {"inputs": 5, "targets": 3}, {"inputs": 40, "targets": 9}]
)
def test_run_task_dataset_equals_seqio_dataset(tasks, limits):
    arguments = dict(sequence_length=limits, split="validation", shuffle=False)
    found = tasks[0].get_dataset(**arguments)
    expected = seqio.Task.get_dataset(tasks[0], **arguments)
    assert {k: s.dtype for k, s in found.element_spec.items()} == {
        k: s.dtype for k, s in expected.element_spec.items()
    }
    assert len(found) == len(TEXTS)
    for one, other in zip(rows(found), rows(expected), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert np.array_equal(one[name], other[name]), name
    assert rows(found.padded_batch(4))[0]["inputs"].shape[0] == 4


@pytest.mark.parametrize("limits", [None, {"inputs": 5, "targets": 3}])
def test_memory_dataset_iterates_over_the_examples_of_its_graph(tasks, limits):
    dataset = tasks[0].get_dataset(sequence_length=limits, split="validation", shuffle=False)
    from_graph = rows(dataset.map(lambda x: x))
    found = [{name: x.numpy() for name, x in row.items()} for row in dataset]
    assert len(found) == len(from_graph) == len(TEXTS)
    for one, other in zip(found, from_graph, strict=True):
        assert {k: np.asarray(v).dtype for k, v in one.items()} == {
            k: np.asarray(v).dtype for k, v in other.items()
        }
        assert all(np.array_equal(one[name], other[name]) for name in other)


def test_memory_dataset_takes_and_caches_as_other_datasets(tasks, tmp_path):
    dataset = tasks[0].get_dataset(split="validation", shuffle=False)
    assert dataset.take(-1) is dataset.take(len(TEXTS)) is dataset
    assert [len(list(dataset.take(count))) for count in (0, 3, 9)] == [0, 3, len(TEXTS)]
    assert not dataset.cached and dataset.cache().cached
    assert rows(dataset.cache())[1]["targets_pretokenized"] == b"bad"
    assert len(list(dataset.cache(str(tmp_path / "cache")))) == len(TEXTS)
    assert list(tmp_path.iterdir())


def test_read_table_equals_table_of_seqio(tasks, monkeypatch):
    arguments = dict(sequence_length={"inputs": 5, "targets": 3}, seed=0)
    found = token_tables.ExampleTable(tasks[0], "train", limit=3, **arguments)
    for name in ("plain_texts", "text_batches"):
        monkeypatch.setattr(in_memory, name, lambda *args: None)
    expected = token_tables.ExampleTable(tasks[0], "train", limit=3, **arguments)
    assert found.num_examples == expected.num_examples == 3
    assert found.num_overlong == expected.num_overlong == 1
    for name in ("inputs", "targets", preprocessors.TASK_IDS):
        for part in ("values", "offsets"):
            one, other = getattr(found, part)[name], getattr(expected, part)[name]
            assert np.array_equal(one, other) and one.dtype == other.dtype, (name, part)


def test_plain_texts_of_other_tasks_are_left_to_seqio(tasks):
    with_bytes = memory_tasks.register("pre_bytes", VALIDATION)
    assert in_memory.plain_texts(with_bytes, "train") is None
    random = tasks[0].replace(
        name="pre_0", preprocessors=[*preprocessors.finish("pre_0"), lambda ds: ds]
    )
    assert in_memory.plain_texts(random, "train") is None
    changed = tasks[0].replace(
        name="pre_0",
        preprocessors=[lambda ds: ds.map(lambda x: {**x, "more": x["inputs"]})]
        + preprocessors.finish("pre_0"),
    )
    assert in_memory.plain_texts(changed, "train") is None


def test_many_tasks_share_graphs_of_tokenizing_and_converting(tasks, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("SeqIO traces this for every task")

    monkeypatch.setattr(seqio.preprocessors, "tokenize_impl", refuse)
    traced = []
    place = PromptFeatureConverter._place
    monkeypatch.setattr(
        PromptFeatureConverter, "_place", lambda *args: traced.append(1) or place(*args)
    )
    mixture = TaskMixture("pre_mixture", NAMES, EqualQuotas(8, 0))
    seqio.MixtureRegistry.remove(mixture.name)
    seqio.MixtureRegistry.add_provider(mixture.name, mixture)
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(NAMES))
    cfg = functools.partial(
        datasets.DatasetConfig,
        mixture_or_task_name=mixture.name,
        task_feature_lengths={"inputs": 40, "targets": 9},
        batch_size=8,
        seed=0,
    )
    train = datasets.train_iterator(cfg(split="train", shuffle=True), converter)
    assert sorted(next(train)["encoder_task_ids"].max(axis=1)) == [0, 0, 1, 1, 2, 2, 3, 3]
    validation = cfg(split="validation", shuffle=False)
    losses = eval_batches(validation, converter)
    assert all(len(list(batches())) for batches in losses.values())
    started = []
    start = tf.data.Dataset.__iter__
    monkeypatch.setattr(tf.data.Dataset, "__iter__", lambda d: started.append(1) or start(d))
    inference = evaluator.InferenceEvaluator(validation, converter, None)
    assert inference.num_examples == dict.fromkeys(NAMES, 4)
    scores = inference.evaluate(lambda batch: batch["decoder_target_tokens"], len, 0)
    assert {score["accuracy"] for score in scores.values()} == {100.0}
    assert not traced, "batches are made from tokens without tf.data"
    assert len(started) == len(NAMES), "one for each source"


def test_loss_batch_of_fleet_task_has_rows_of_its_share(tasks):
    mixture = TaskMixture("pre_shares", NAMES, EqualQuotas(16, 0))
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(NAMES))
    cfg = datasets.DatasetConfig(
        mixture, {"inputs": 40, "targets": 9}, "validation", 16, shuffle=False, seed=0
    )
    whole = eval_batches(cfg, converter)
    (batch,) = whole[NAMES[1]]()
    assert batch["decoder_target_tokens"].shape == (4, 9) and len(list(whole[mixture.name]())) == 4
    (batch,) = eval_batches(cfg, converter, row_multiple=8)[NAMES[1]]()
    assert len(batch["decoder_target_tokens"]) == 8
    (batch,) = eval_batches(cfg, converter, row_multiple=32)[NAMES[1]]()
    assert len(batch["decoder_target_tokens"]) == 16
