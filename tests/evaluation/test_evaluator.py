"""The evaluator, driven by functions whose every output is known."""

import functools
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from mpt_jax.core.runs import Runs
from mpt_jax.data import task_lookup, token_tables
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.sampling import task_mixture
from mpt_jax.evaluation.evaluator import InferenceEvaluator, labels_of, with_labels
from tests.fixtures import memory_tasks

NAMES = ["evl_a", "evl_b", "evl_c"]
CONVERTER = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(NAMES))
YES, NO = [124, 104, 118, 1], [113, 114, 1, 0]  # Bytes + 3, then EOS; targets take 4.


def accuracy(targets, predictions):
    return {
        "accuracy": 100
        * float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))
    }


def mean_score(targets, scores):
    return {"mean_score": float(np.mean(scores))}


def register(name, targets, metric_fns, source=None, preprocessors=()):
    """Registers a task of inputs "<name> 0", "<name> 1", ... and these targets."""
    texts = [(f"{name} {i}", target) for i, target in enumerate(targets)]
    source = source or memory_tasks.listed(texts, ["validation"])
    memory_tasks.register(name, source, metric_fns, preprocessors)


@pytest.fixture(scope="module", autouse=True)
def tasks():
    labeled = with_labels(accuracy, ["yes", "no"])
    register("evl_a", ["yes", "no", "no", "yes", "no"], [labeled])
    register("evl_b", ["a", "bc", "d"], [accuracy])
    register("evl_c", ["no", "yes"], [with_labels(accuracy, ["no", "yes", "may"]), mean_score])


def config(name, **changes):
    lengths = {"inputs": 10, "targets": 4}
    arguments = dict(split="validation", batch_size=4, shuffle=False, seed=0, **changes)
    return DatasetConfig(name, **{"task_feature_lengths": lengths, **arguments})


class Model:
    """Predicts the target except for rows whose input ends in an even digit."""

    def __init__(self):
        self.batches = 0

    def predict(self, batch):
        self.batches += 1
        assert batch["encoder_input_tokens"].shape == (4, 12)
        tokens = batch["decoder_target_tokens"].copy()
        tokens[self.digit(batch) % 2 == 0, 0] += 1
        return tokens

    def score(self, batch):
        """Task index, and +10 for 'yes'; nothing for rows without a target."""
        self.batches += 1
        targets = batch["decoder_target_tokens"]
        weights = batch["decoder_loss_weights"]
        np.testing.assert_array_equal(weights, targets != 0)
        np.testing.assert_array_equal(batch["decoder_input_tokens"][:, 1:], targets[:, :-1])
        np.testing.assert_array_equal(
            batch["decoder_task_ids"], weights * batch["encoder_task_ids"].max(1, keepdims=True)
        )
        return batch["encoder_task_ids"].max(1) + 10.0 * (targets[:, :4] == YES).all(1)

    @staticmethod
    def digit(batch):
        # P = 2, then "evl_x ", then the digit.
        return batch["encoder_input_tokens"][:, 8] - 3 - ord("0")


def test_evaluator_mixed_batches_metrics_match_by_hand(tmp_path):
    model = Model()
    evaluator = InferenceEvaluator(config(task_mixture(NAMES)), CONVERTER, str(tmp_path))
    assert evaluator.task_names == tuple(NAMES)
    found = evaluator.evaluate(model.predict, model.score, step=7)
    assert found == {
        # Odd rows are right; ranking always says "yes".
        "evl_a": {"accuracy": 40.0, "rank_accuracy": 40.0},
        "evl_b": {"accuracy": pytest.approx(100 / 3)},
        # Of the targets "no" and "yes"; log-probabilities 2 and 12.
        "evl_c": {"accuracy": 50.0, "mean_score": 7.0, "rank_accuracy": 50.0},
    }
    assert list(found["evl_a"]) == ["accuracy", "rank_accuracy"]
    # 10 examples in 3 batches, 2 to score in 1, and 7 with labels in 2 for each of 3 labels.
    assert model.batches == 3 + 1 + 2 * 3
    again = evaluator.evaluate(model.predict, model.score, step=8)
    assert again == found


def test_evaluator_chosen_tasks_have_the_scores_that_they_have_among_all(tmp_path):
    evaluator = InferenceEvaluator(config(task_mixture(NAMES)), CONVERTER, str(tmp_path))
    everything = evaluator.evaluate(Model().predict, Model().score, step=7)
    for names in (["evl_b"], ["evl_c", "evl_a"], NAMES):
        model = Model()
        chosen = evaluator.evaluate(model.predict, model.score, step=8, task_names=names)
        assert chosen == {name: everything[name] for name in NAMES if name in names}
        if names == ["evl_b"]:
            assert model.batches == 1, "3 examples to decode, none to score or to rank"
    evaluator.close()
    lines = (tmp_path / "evl_a-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [7, 8, 8]


def test_evaluator_files_match_t5x_layout(tmp_path):
    evaluator = InferenceEvaluator(config(task_mixture(NAMES)), CONVERTER, str(tmp_path))
    evaluator.evaluate(Model().predict, Model().score, step=7)
    evaluator.close()
    (metrics,) = (tmp_path / "evl_a-metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics) == {"step": 7, "accuracy": 40.0, "rank_accuracy": 40.0}
    lines = [json.loads(x) for x in (tmp_path / "evl_b-000007.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines] == ["a", "bc", "d"]
    assert [line["prediction"] for line in lines] == ["b", "bc", "e"]
    assert [line["input"]["inputs_pretokenized"] for line in lines] == [f"evl_b {i}" for i in "012"]
    assert list((tmp_path / "evl_c").glob("events*"))


def test_evaluator_without_output_dir_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluator = InferenceEvaluator(config("evl_b"), CONVERTER, None)
    assert evaluator.evaluate(Model().predict, Model().score, 0) == {
        "evl_b": {"accuracy": pytest.approx(100 / 3)}
    }
    assert not list(tmp_path.iterdir())


def test_evaluator_class_settings_apply(tmp_path):
    cls = functools.partial(seqio.Evaluator, logger_cls=(seqio.JSONLogger,), num_examples=2)
    evaluator = InferenceEvaluator(config("evl_b"), CONVERTER, str(tmp_path), evaluator_cls=cls)
    found = evaluator.evaluate(Model().predict, Model().score, 0)
    assert found == {"evl_b": {"accuracy": 50.0}}
    assert not list(tmp_path.glob("evl_b/events*"))


@pytest.mark.parametrize("where", ["evaluator", "dataset_cfg"])
def test_evaluator_without_memory_cache_rereads_data(where):
    """T5X's EVALUATOR_USE_MEMORY_CACHE is the evaluator's."""
    passes = []

    def rows(split, shuffle_files, seed=None):
        def read():
            passes.append(split)
            yield from ({"inputs": f"evl_n {i}", "targets": "a"} for i in range(3))

        spec = tf.TensorSpec([], tf.string)
        return tf.data.Dataset.from_generator(
            read, output_signature={"inputs": spec, "targets": spec}
        )

    register("evl_n", [], [accuracy], source=seqio.FunctionDataSource(rows, ["validation"]))
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(["evl_n"]))

    def reads_of_an_evaluation(in_evaluator, in_cfg):
        cls = functools.partial(seqio.Evaluator, logger_cls=(), use_memory_cache=in_evaluator)
        cfg = config("evl_n", use_memory_cache=in_cfg)
        evaluator = InferenceEvaluator(cfg, converter, None, evaluator_cls=cls)
        evaluator.evaluate(Model().predict, Model().score, 0)
        before = len(passes)
        evaluator.evaluate(Model().predict, Model().score, 1)
        return len(passes) - before

    assert reads_of_an_evaluation(True, True) == 0
    assert reads_of_an_evaluation(where != "evaluator", where != "dataset_cfg") > 0


def test_evaluator_without_limits_measures_lengths():
    cfg = config(task_mixture(NAMES), task_feature_lengths=None)
    evaluator = InferenceEvaluator(cfg, CONVERTER, None)
    ((_, first), *_) = evaluator._read(("evl_a",))
    # "evl_a 0" and EOS behind two prompt rows; "yes" and EOS.
    assert first["encoder_input_tokens"].shape == (4, 10)
    assert first["decoder_target_tokens"].tolist() == [YES, NO, NO, YES]


def test_evaluator_two_hosts_share_each_batch():
    evaluators = [
        InferenceEvaluator(config("evl_a"), CONVERTER, None, num_hosts=2, host_index=i)
        for i in range(2)
    ]
    parts = [list(e._read(("evl_a",))) for e in evaluators]
    digits = [[Model.digit(b).tolist() for _, b in part] for part in parts]
    assert digits == [[[0, 1], [4, -51]], [[2, 3], [-51, -51]]]


def test_evaluator_length_buckets_keep_row_order(tmp_path):
    register("evl_r", [str(i) for i in range(40)], [accuracy])
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(["evl_r"]))
    shapes, files = set(), []

    def predict(batch):
        shapes.add(batch["encoder_input_tokens"].shape)
        tokens = batch["decoder_target_tokens"].copy()
        odd = batch["encoder_input_tokens"].sum(axis=1) % 2 == 1
        tokens[odd, 0] += 1
        return tokens

    for buckets in ({"inputs": []}, {"inputs": [8]}):
        cfg = config("evl_r", length_buckets=buckets)
        folder = tmp_path / str(len(files))
        evaluator = InferenceEvaluator(cfg, converter, str(folder))
        evaluator.evaluate(predict, Model().score, 0)
        evaluator.close()
        files.append((folder / "evl_r-000000.jsonl").read_text())
    assert files[0] == files[1] and files[0].count("\n") == 40
    assert shapes == {(4, 10), (4, 12)}, "ten texts have one digit, the others two"


def test_labels_of_task_returns_declared_labels():
    task = seqio.TaskRegistry.get("evl_c")
    assert labels_of(task) == ("no", "yes", "may")
    assert labels_of(seqio.TaskRegistry.get("evl_b")) == ()
    assert labels_of(task.replace(name="evl_d")) == ("no", "yes", "may")


def test_evaluator_target_outside_labels_raises():
    register("evl_a", ["yes", "maybe"], [with_labels(accuracy, ["yes", "no"])])
    cfg = config("evl_a", task_feature_lengths={"inputs": 10, "targets": 6})
    evaluator = InferenceEvaluator(cfg, CONVERTER, None)
    predict = lambda batch: batch["decoder_target_tokens"]  # noqa: E731
    score = lambda batch: np.zeros(4)  # noqa: E731
    message = r"declares the labels 'yes', 'no', but an example has the target 'maybe'"
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate(predict, score, 0)


def aux_metric(targets, predictions, aux_values):
    return {}


@pytest.mark.parametrize(
    "targets, metric_fns, changes, message",
    [
        ([], [accuracy], {}, "The 'validation' split of these tasks is empty: evl_x"),
        (["a"], [accuracy], {"split": "test"}, "'evl_x' has no 'test' split; it has validation"),
        (["a"], [], {}, "No task of 'evl_x' has metrics"),
        (["a"], [aux_metric], {}, "'evl_x' has a metric that reads auxiliary values"),
        (["abcde"], [accuracy], {}, r"targets': 4} \(evl_x: 1 of 1 \(100.00%\)\). Raise the lim"),
    ],
)
def test_evaluator_invalid_task_raises(targets, metric_fns, changes, message):
    register("evl_x", targets, metric_fns)
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(["evl_x"]))
    cfg = DatasetConfig(
        "evl_x",
        **{
            **dict(task_feature_lengths={"inputs": 10, "targets": 4}, split="validation"),
            **dict(batch_size=4, shuffle=False, seed=0),
            **changes,
        },
    )
    with pytest.raises(ValueError, match=message):
        InferenceEvaluator(cfg, converter, None)


def readers_of(name):
    """Returns readers of a task's validation split: the table of training, and the evaluator."""
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs([name]))
    lengths = {"inputs": 10, "targets": 4}
    return (
        lambda: token_tables.ExampleTable(task_lookup.find_task(name), "validation", lengths, 0),
        lambda: InferenceEvaluator(config(name), converter, None),
    )


def test_eval_data_preprocessor_bug_raises_its_own_error():
    wrong = seqio.map_over_dataset(lambda example: {"inputs": example["question"]})
    register("evl_x", ["a"], [accuracy], preprocessors=[wrong])
    for read in readers_of("evl_x"):
        with pytest.raises(KeyError, match="question"):
            read()


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("/no/such/folder"),
        tf.errors.NotFoundError(None, None, "/no/such/folder"),
        AssertionError("Dataset x: could not find data in /no/such/folder."),
        tfds.core.registered.DatasetNotFoundError("/no/such/folder\nAvailable:\n- glue\n"),
    ],
)
def test_eval_data_missing_error_says_how_to_get_it(error):
    def gone(split, shuffle_files, seed=None):
        raise error

    register("evl_x", [], [accuracy], source=seqio.FunctionDataSource(gone, ["validation"]))
    for read in readers_of("evl_x"):
        with pytest.raises(ValueError, match="could not be read.*/no/such/folder.*tfds build"):
            read()


def test_eval_data_unprepared_raises():
    """TFDS sources have no splits before the data is prepared."""
    source = seqio.FunctionDataSource(lambda split, shuffle_files: None, [])
    register("evl_x", [], [accuracy], source=source)
    for read in readers_of("evl_x"):
        with pytest.raises(ValueError, match="task 'evl_x' could not be read.*--tfds_data_dir"):
            read()


def test_evaluator_unknown_names_raise_with_suggestion():
    with pytest.raises(ValueError, match="Unknown task or mixture 'evl_bb'. Did you mean 'evl_b'"):
        InferenceEvaluator(config("evl_bb"), CONVERTER, None)
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(["evl_a"]))
    with pytest.raises(ValueError, match="Unknown run 'evl_b'. Did you mean 'evl_a'"):
        InferenceEvaluator(config("evl_b"), converter, None)


def test_evaluator_constant_predictions_warn_once_per_change(tmp_path, caplog):
    golds = ["yes", "yes", "yes", "yes", "no"]
    register("evl_d", golds, [with_labels(accuracy, ["yes", "no"])])
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(["evl_d"]))
    evaluator = InferenceEvaluator(config("evl_d"), converter, str(tmp_path))

    def predictions(*texts):
        def predict(batch):
            rows = np.array([YES if texts[i % len(texts)] == "yes" else NO for i in range(4)])
            return rows * batch["decoder_target_tokens"].any(1, keepdims=True)

        return predict

    score = lambda batch: (batch["decoder_target_tokens"] == YES).all(1) + 0.0  # noqa: E731
    with caplog.at_level("INFO", logger="absl"):
        for step, texts in enumerate([("yes",), ("yes",), ("yes", "no"), ("no",)]):
            found = evaluator.evaluate(predictions(*texts), score, step)["evl_d"]
            assert found.get("constant_prediction") == (None if len(texts) > 1 else 1.0)
    evaluator.close()
    lines = [r.getMessage() for r in caplog.records if " of evl_d " in r.getMessage()]
    assert lines == [
        "Every prediction of evl_d is 'yes', which scores 80.0 (accuracy).",
        "Predictions of evl_d are no longer all the same.",
        "Every prediction of evl_d is 'no', which scores 20.0 (accuracy).",
    ]
    written = [json.loads(x) for x in (tmp_path / "evl_d-metrics.jsonl").read_text().splitlines()]
    assert [line.get("constant_prediction") for line in written] == [1.0, 1.0, None, 1.0]


@pytest.mark.parametrize("golds", [["yes", "yes", "yes"], ["yes"]])
def test_evaluator_constant_gold_or_single_example_is_no_constant_prediction(golds):
    register("evl_e", golds, [accuracy])
    converter = functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs(["evl_e"]))
    evaluator = InferenceEvaluator(config("evl_e"), converter, None)
    predict = lambda batch: np.array([YES] * 4) * batch["decoder_target_tokens"].any(1)[:, None]  # noqa: E731
    assert evaluator.evaluate(predict, Model().score, 0) == {"evl_e": {"accuracy": 100.0}}
