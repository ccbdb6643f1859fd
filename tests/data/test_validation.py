"""Settings that are checked before any data is read."""

from __future__ import annotations

import types

import pytest
import seqio
import tensorflow as tf

from mpt_jax.data import datasets, task_lookup, validation
from mpt_jax.training.partitioning import PjitPartitioner
from tests.fixtures import memory_tasks, training_runs

LENGTHS = {"inputs": 4, "targets": 2}


def config(name="val_numbers", **overrides):
    memory_tasks.register_numbers(name, lambda i: tf.constant("t"), {"train": 4})
    settings = dict(task_feature_lengths=LENGTHS, split="train", batch_size=8, shuffle=False)
    return datasets.DatasetConfig(name, seed=0, **{**settings, **overrides})


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"batch_size": 4},
            r"batch of 4 rows .* 8 shards of the mesh .*Set BATCH_SIZE .* multiple of 8 rows.* 8,",
        ),
        ({"batch_size": 20}, "such as 16, or use fewer devices"),
        ({"task_feature_lengths": {"input": 4, "targets": 2}}, r"for 'targets', got {'input': 4"),
        ({"task_feature_lengths": {"inputs": 4}}, "Set TASK_FEATURE_LENGTHS, for example"),
        ({"task_feature_lengths": {"inputs": 0, "targets": 2}}, "a limit of at least 1"),
        (
            {"use_cached": True},
            "no offline cache of task 'val_numbers' .* USE_CACHED_TASKS = False",
        ),
        ({"name": "n" * 192}, "has 192 bytes, .* at most 191. Shorten the name"),
        ({"name": "é" * 96}, "has 192 bytes"),
    ],
)
def test_settings_that_would_fail_later_raise(overrides, message):
    with pytest.raises(ValueError, match=message):
        validation.check_settings(config(**overrides), "BATCH_SIZE", 8)


def test_settings_that_fit_are_accepted(tmp_path):
    validation.check_settings(config(batch_size=16), "BATCH_SIZE", 8)
    validation.check_settings(config(task_feature_lengths=None), "BATCH_SIZE", 8)
    validation.check_settings(config("n" * 191), "BATCH_SIZE", 8)
    (tmp_path / ("n" * 191 + "-predict_with_aux.jsonl-00000-of-00001.partial_of")).touch()


def test_task_with_another_vocabulary_than_the_model_raises():
    cfg, other = config(), seqio.ByteVocabulary(extra_ids=5)
    own = cfg.provider().output_features["inputs"].vocabulary
    for pair in ((own, own), (None, None)):
        model = types.SimpleNamespace(input_vocabulary=pair[0], output_vocabulary=pair[1])
        validation.check_vocabularies(cfg, model)
    for pair, feature in (((other, own), "inputs"), ((own, other), "targets")):
        model = types.SimpleNamespace(input_vocabulary=pair[0], output_vocabulary=pair[1])
        message = f"'val_numbers' has the vocabulary .* for {feature}, and .*bind VOCABULARY"
        with pytest.raises(ValueError, match=message):
            validation.check_vocabularies(cfg, model)


def test_train_indivisible_batch_raises_before_data_is_read(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(PjitPartitioner, "num_shards", property(lambda self: 4))
    monkeypatch.setattr(datasets, "train_iterator", lambda *_, **__: pytest.fail("data was read"))
    with pytest.raises(ValueError, match="A batch of 6 rows .* Set BATCH_SIZE"):
        training_runs.run(backbone, tmp_path / "run")
    fits = training_runs.dataset(training_runs.build().runs, batch_size=6, split="validation")
    monkeypatch.setattr(PjitPartitioner, "num_shards", property(lambda self: 3))
    wrong = training_runs.dataset(training_runs.build().runs, batch_size=4, split="validation")
    with pytest.raises(ValueError, match="A batch of 4 rows .* Set EVAL_BATCH_SIZE"):
        training_runs.run(
            backbone,
            tmp_path / "run",
            train_eval_dataset_cfg=fits,
            infer_eval_dataset_cfg=wrong,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.devices(8)
def test_partitioner_shards_are_devices_per_partition():
    assert [PjitPartitioner(n).num_shards for n in (1, 2, 8)] == [8, 4, 1]


def test_task_module_with_extension_raises_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "val_suite.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="Leave off .py: write 'val_suite'"):
        task_lookup.import_suites(["val_suite.py"])
    with pytest.raises(ValueError, match="write 'folder.suite'"):
        task_lookup.import_suites(["./folder/suite.py"])
