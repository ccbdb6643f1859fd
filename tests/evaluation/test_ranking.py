"""Rank classification with ties."""

import numpy as np
import pytest

from mpt_jax.core.runs import Runs
from mpt_jax.evaluation import ranking
from mpt_jax.evaluation.evaluator import with_labels
from tests.fixtures import memory_tasks

LABELS = ("a", "b", "c")
IDS = {label: ord(label) + 3 for label in LABELS}


def accuracy(targets, predictions):
    return {"accuracy": 0.0}


def ranked(golds, scores):
    """Ranks one example per gold label; `scores` has the log-probability of a, b and c."""
    source = memory_tasks.listed([("x", "a")])
    task = memory_tasks.register("rank_t", source, [with_labels(accuracy, LABELS)])

    def score(batch):
        return [
            row[IDS_ORDER.index(tokens[0])]
            for row, tokens in zip(scores, batch["decoder_target_tokens"], strict=True)
        ]

    batch = {
        "encoder_task_ids": np.zeros((len(golds), 4), np.int32),
        "decoder_target_tokens": np.array([[IDS[gold], 1] for gold in golds], np.int32),
    }
    return ranking.Ranker({"rank_t": task}, Runs(["rank_t"]), score)(batch)


IDS_ORDER = list(IDS.values())


@pytest.mark.parametrize(
    ("gold", "scores", "credit", "tied"),
    [
        ("b", [-2.0, -1.0, -3.0], 1, 0),
        ("a", [-2.0, -1.0, -3.0], 0, 0),
        ("a", [-1.0, -1.0, -3.0], 1 / 2, 1),  # the first column does not win
        ("b", [-1.0, -1.0, -3.0], 1 / 2, 1),
        ("c", [-1.0, -1.0, -3.0], 0, 1),
        ("c", [-1.0, -1.0, -1.0], 1 / 3, 1),
        ("a", [np.nan, -1.0, -3.0], 0, 1),
    ],
)
def test_ranking_credit_is_expected_accuracy_of_a_random_choice(gold, scores, credit, tied):
    np.testing.assert_allclose(ranked([gold], [scores]), [[credit, tied]])


def test_accuracies_warn_of_the_share_of_ties(caplog):
    rows = ranked(["a", "b", "c", "a"], [[-1, -1, -1], [-2, -1, -3], [-2, -1, -3], [-1, -2, -3]])
    with caplog.at_level("WARNING", logger="absl"):
        found = ranking.accuracies({"rank_t": rows})
    assert found == {"rank_t": {"rank_accuracy": pytest.approx(100 * (1 / 3 + 1 + 0 + 1) / 4)}}
    (line,) = [record.getMessage() for record in caplog.records]
    assert "Task rank_t: in 1 of 4 examples (25.0%) no single label" in line
