"""Metrics against scikit-learn, the official SQuAD script's definitions, and numbers by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import sklearn.metrics

from tasks import text_metrics as metrics

LABELS = ("no", "yes")


def drawn(labels, invalid, count=200):
    """Targets, and predictions of which some are `invalid`."""
    rng = random.Random(0)
    said = [*labels, invalid] if invalid else list(labels)
    return rng.choices(labels, k=count), rng.choices(said, k=count)


@pytest.mark.parametrize("invalid", [None, "maybe"])
def test_two_labels_against_scikit_learn(invalid):
    targets, predictions = drawn(LABELS, invalid)
    # T5's rule: what is no label is the wrong label.
    wrong = {"no": "yes", "yes": "no"}
    said = [wrong[t] if p == invalid else p for t, p in zip(targets, predictions, strict=True)]
    expected = 100 * sklearn.metrics.f1_score(targets, said, pos_label="yes")
    assert metrics.f1(LABELS)(targets, predictions)["f1"] == pytest.approx(expected)
    expected = 100 * sklearn.metrics.matthews_corrcoef(targets, said)
    found = metrics.matthews(LABELS)(targets, predictions)["matthews"]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("invalid", [None, "maybe"])
def test_several_labels_against_scikit_learn(invalid):
    labels = ("a", "b", "c")
    targets, predictions = drawn(labels, invalid)
    expected = sklearn.metrics.f1_score(
        targets, predictions, labels=labels, average="macro", zero_division=0
    )
    found = metrics.macro_f1(labels)(targets, predictions)["f1"]
    assert found == pytest.approx(100 * expected)


def test_accuracy_forgives_white_space_alone():
    found = metrics.accuracy(["yes", "yes", "yes", "no"], [" yes\n", "Yes", "yes no", "no"])
    assert found == {"accuracy": 50.0}


def test_the_rate_of_what_is_no_label():
    found = metrics.invalid_rate(LABELS)(["yes"] * 4, ["", " no ", "NO", "yes"])
    assert found == {"invalid": 50.0}


def test_one_sided_predictions_correlate_with_nothing():
    targets = ["yes", "no", "yes"]
    assert metrics.matthews(LABELS)(targets, ["yes"] * 3) == {"matthews": 0.0}
    assert metrics.f1(LABELS)(targets, ["no"] * 3) == {"f1": 0.0}


def test_correlations_against_numpy_and_ranks_by_hand():
    targets, predictions = ["0.0", "1.2", "3.4", "5.0"], ["1.0", "0.8", "2.", "100"]
    found = metrics.correlations(targets, predictions)
    expected = np.corrcoef([0, 1.2, 3.4, 5], [1, 0.8, 2, 100])[0, 1]
    assert found["pearson"] == pytest.approx(100 * expected)
    # Ranks 1 2 3 4 against 2 1 3 4: 1 - 6 * 2 / (4 * 15).
    assert found["spearman"] == pytest.approx(80.0)
    assert found["invalid"] == 0.0


@pytest.mark.parametrize("text", ["", "nan", "inf", "1_0", "3.8.", "three", "1e3", "٣"])
def test_what_is_no_number_counts_as_nought(text):
    found = metrics.correlations(["0.0", "1.0", "2.0"], [text, "1.0", "2.0"])
    assert found["pearson"] == pytest.approx(100.0)
    assert found["invalid"] == pytest.approx(100 / 3)


def test_constant_numbers_correlate_with_nothing():
    found = metrics.correlations(["0.0", "1.0"], ["2.0", "2.0"])
    assert found == {"pearson": 0.0, "spearman": 0.0, "invalid": 0.0}
    assert not any(map(math.isnan, found.values()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, a dog!", "cat dog"),
        ("U.S.", "us"),
        ("U . S .", "u s"),
        ("Anna's theatre", "annas theatre"),
        ("An", ""),
        ("l'été — «rouge»", "lété — «rouge»"),
        (" \n", ""),
    ],
)
def test_normalization_of_answers(text, expected):
    assert metrics.normalized(text) == expected


@pytest.mark.parametrize(
    ("answer", "prediction", "expected"),
    [
        ("a big red cat", "red cat", 0.8),
        ("cat cat", "cat", 2 / 3),
        ("the", "the", 0.0),  # nothing is left of either: the official script's 0
        ("cat", "", 0.0),
    ],
)
def test_word_f1(answer, prediction, expected):
    assert metrics.word_f1(answer, prediction) == pytest.approx(expected)


def question(*answers, group=""):
    return {"answers": list(answers), "group": group}


def test_the_best_answer_counts():
    targets = [question("a cat", "big cat"), question("dog")]
    found = metrics.answer_overlap(targets, ["Big cat.", "big dog"])
    assert found == {"f1": pytest.approx(100 * (1 + 2 / 3) / 2), "exact_match": 50.0}


def test_a_question_of_several_rows_counts_once():
    once = [question("Ann", "Bob", group="1/2"), question("Ann", "Bob", group="1/2")]
    other = question("Cy", group="1/3")
    found = metrics.answer_overlap([*once, other], ["Bob", "Bob", "wrong"])
    assert found == {"f1": 50.0, "exact_match": 50.0}


def test_postprocessing_keeps_all_answers():
    example = {"answers": np.array([b"Ann", "José".encode()], object), "group": b"1/2"}
    assert metrics.gold_answers("Ann", example=example, is_target=True) == {
        "answers": ["Ann", "José"],
        "group": "1/2",
    }
    assert metrics.gold_answers("Bob", example=example, is_target=False) == "Bob"
