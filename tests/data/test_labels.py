"""Labels looked at through a vocabulary, before any data is read."""

import functools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from mpt_jax import infer
from mpt_jax.core.runs import Runs
from mpt_jax.data import datasets, labels, vocabularies
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.loss_batches import eval_batches
from mpt_jax.evaluation.evaluator import InferenceEvaluator, with_labels
from mpt_jax.runtime.paths import SHIPPED
from tests.fixtures import memory_tasks, training_runs

TOY = vocabularies.load(str(SHIPPED / "toy.model"), 16)  # without digits; it normalizes by NFKC
LIGATURE = "\N{LATIN SMALL LIGATURE FI}lm good", "\N{LATIN SMALL LIGATURE FI}lm bad"


def accuracy(targets, predictions):
    return {"accuracy": 100 * float(np.mean(np.array(targets) == np.array(predictions)))}


def unread(split, shuffle_files=False, seed=None):
    raise AssertionError("data was read")


def register(name, words, vocabulary=TOY, source=None):
    source = source or seqio.FunctionDataSource(unread, splits=["train", "validation"])
    metric = with_labels(accuracy, words)
    return memory_tasks.register(name, source, [metric], vocabulary=vocabulary)


def config(name, split="train", targets=8):
    lengths = {"inputs": 16, "targets": targets}
    return DatasetConfig(name, lengths, split, batch_size=2, shuffle=False, seed=0)


def converter(name):
    return functools.partial(PromptFeatureConverter, prompt_length=2, runs=Runs([name]))


READERS = {
    "training": lambda name: datasets.train_iterator(config(name), converter(name)),
    "loss": lambda name: eval_batches(config(name), converter(name)),
    "metrics": lambda name: InferenceEvaluator(config(name, "validation"), converter(name), None),
    "infer": lambda name: infer._tasks(config(name), training_runs.build(runs=Runs([name]))),
}


@pytest.mark.parametrize("reader", READERS)
def test_labels_with_equal_tokens_raise_before_data_is_read(reader):
    register("lab_equal", ("0", "1"))
    with pytest.raises(ValueError) as error:
        READERS[reader]("lab_equal")
    assert str(error.value) == (
        "The labels '0' and '1' of task 'lab_equal' have the same tokens ('▁', '<unk>'), so the "
        "model cannot tell them apart. Use other words for the labels."
    )


def test_label_with_unknown_token_raises_with_its_pieces():
    task = register("lab_unknown", ("good", "bad \N{THUMBS DOWN SIGN}"))
    with pytest.raises(ValueError, match="'bad 👎' of task 'lab_unknown' has characters .*'<unk>'"):
        labels.check(task, None)


def test_labels_with_unknown_token_advise_digits_the_vocabulary_has():
    task = register("lab_digits", ("\N{THUMBS UP SIGN}", "\N{THUMBS DOWN SIGN}"), Digits())
    with pytest.raises(ValueError, match="Use other words for the labels, or digits."):
        labels.check(task, None)


class Digits(seqio.ByteVocabulary):
    """Bytes, in which text outside ASCII is unknown."""

    def _encode(self, s):
        return [self.unk_id] if not s.isascii() else super()._encode(s)


def test_labels_decoded_alike_raise():
    class Lower(seqio.ByteVocabulary):
        def _decode(self, ids):
            return super()._decode(ids).lower()

    task = register("lab_case", ("yes", "Yes"), Lower())
    with pytest.raises(ValueError, match="'yes' and 'Yes' .* are both decoded as 'yes'"):
        labels.check(task, None)


def test_label_longer_than_limit_raises_with_limit_and_setting():
    task = register("lab_long", ("no", "maybe"), seqio.ByteVocabulary())
    labels.check(task, 6)  # five bytes and the end of sequence
    with pytest.raises(ValueError) as error:
        labels.check(task, 5)
    assert str(error.value) == (
        "The label 'maybe' of task 'lab_long' has 6 tokens, including the end of sequence, but the "
        "limit on targets is 5. Set 'targets' in TASK_FEATURE_LENGTHS to at least 6, or choose "
        "shorter labels."
    )
    with pytest.raises(ValueError, match="the limit on targets is 5"):
        datasets.train_iterator(config("lab_long", targets=5), converter("lab_long"))


def test_rewritten_labels_are_logged_once_with_both_forms(caplog):
    task = register("lab_rewritten", LIGATURE)
    with caplog.at_level("INFO", logger="absl"):
        labels.check(task, 8)
        labels.check(task, 8)
    (line,) = [x.getMessage() for x in caplog.records if "lab_rewritten" in x.getMessage()]
    assert f"writes {LIGATURE[0]!r} as 'film good', {LIGATURE[1]!r} as 'film bad'" in line


def test_evaluation_of_rewritten_labels_counts_right_predictions():
    texts = [("the film", LIGATURE[0]), ("the song", LIGATURE[1]), ("the meal", LIGATURE[0])]
    register("lab_metric", LIGATURE, source=memory_tasks.listed(texts, ["validation"]))
    cfg = config("lab_metric", "validation")
    evaluator = InferenceEvaluator(cfg, converter("lab_metric"), None)
    good = tf.constant(TOY.encode(LIGATURE[0]) + [1]).numpy()

    def always_good(batch):
        tokens = np.zeros_like(batch["decoder_target_tokens"])
        tokens[:, : len(good)] = good
        return tokens

    is_good = lambda batch: 0.0 + (batch["decoder_target_tokens"][:, : len(good)] == good).all(1)  # noqa: E731
    found = evaluator.evaluate(always_good, is_good, 0)["lab_metric"]
    assert found["accuracy"] == pytest.approx(200 / 3)  # by the file's text it would be 0
    assert found["rank_accuracy"] == pytest.approx(200 / 3)
