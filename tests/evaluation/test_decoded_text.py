"""Gold texts and predictions, compared as the vocabulary writes them."""

import numpy as np
import pytest

from mpt_jax.data import vocabularies
from mpt_jax.evaluation import decoded_text, evaluator
from mpt_jax.runtime.paths import SHIPPED
from mpt_jax.tasks import generation_metrics, text_metrics
from tests.fixtures import memory_tasks

TOY = vocabularies.load(str(SHIPPED / "toy.model"), 16)
# Normalized (ligature, full-width letters), and with a letter that the vocabulary lacks.
WRITTEN = {"ﬁlm": "film", "ｆｉｌｍ": "film", "ﬁlm café": "film caf ⁇"}


def score(gold, ids, metric, postprocess=None, **features):
    """Returns a metric of one example, computed as SeqIO's evaluator does."""
    source = memory_tasks.listed([("a", "b")])
    task = memory_tasks.register("dec", source, [metric], vocabulary=TOY, postprocess=postprocess)
    (compared,) = decoded_text.compared(task).metric_objs
    example = {"targets_pretokenized": gold.encode(), **features}
    made = compared.from_model_output([example], np.array([ids]), task.output_features)
    return made.actual_compute([example], task.output_features)[0]


@pytest.mark.parametrize("gold", WRITTEN)
def test_free_text_gold_is_compared_as_the_vocabulary_writes_it(gold):
    ids = [*TOY.encode(gold), 1]
    assert TOY.decode(ids).strip() == WRITTEN[gold]
    assert score(gold, ids, text_metrics.accuracy) == {"accuracy": 100.0}
    assert score(gold, [*TOY.encode("song"), 1], text_metrics.accuracy) == {"accuracy": 0.0}


@pytest.mark.parametrize("gold", WRITTEN)
def test_answers_and_references_are_compared_as_the_vocabulary_writes_them(gold):
    ids = [*TOY.encode(gold), 1]
    answers = np.array([b"song", gold.encode()])
    features = {"answers": answers, "group": gold.encode(), "references": answers}
    overlap, gold_answers = text_metrics.answer_overlap, text_metrics.gold_answers
    found = score(gold, ids, overlap, gold_answers, **features)
    assert found == {"f1": 100.0, "exact_match": 100.0}

    def same(targets, predictions):
        return {"same": float(predictions[0] in [text.strip() for text in targets[0]])}

    found = score(gold, ids, same, generation_metrics.references, **features)
    assert found == {"same": 1.0}


def test_question_groups_keep_their_names():
    task = memory_tasks.register(
        "dec_group",
        memory_tasks.listed([("a", "b")]),
        [text_metrics.answer_overlap],
        vocabulary=TOY,
        postprocess=text_metrics.gold_answers,
    )
    example = {"answers": np.array([b"film"]), "group": "ﬁlm 7".encode()}
    made = decoded_text.compared(task).postprocessor("b", example=example, is_target=True)
    assert made == {"answers": ["film"], "group": "ﬁlm 7"}


def test_prediction_of_rewritten_label_becomes_the_label():
    metric = evaluator.with_labels(text_metrics.accuracy, ["ﬁlm good", "song"])
    assert score("ﬁlm good", [*TOY.encode("film good"), 1], metric) == {"accuracy": 100.0}
    assert score("ﬁlm good", [*TOY.encode("song"), 1], metric) == {"accuracy": 0.0}
