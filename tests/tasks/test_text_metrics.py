"""Metrics against scikit-learn, the official SQuAD script's definitions, and numbers by hand."""

from __future__ import annotations

import inspect
import math
import random

import numpy as np
import pytest
import sklearn.metrics

from mpt_jax.evaluation import evaluator
from mpt_jax.tasks import text_metrics as metrics

LABELS = ("no", "yes")


def drawn(labels, invalid, count=200):
    """Targets, and predictions of which some are `invalid`."""
    rng = random.Random(0)
    said = [*labels, invalid] if invalid else list(labels)
    return rng.choices(labels, k=count), rng.choices(said, k=count)


@pytest.mark.parametrize("invalid", [None, "maybe"])
def test_f1_two_labels_matches_scikit_learn(invalid):
    targets, predictions = drawn(LABELS, invalid)
    # T5's rule: an invalid prediction is the wrong label.
    wrong = {"no": "yes", "yes": "no"}
    said = [wrong[t] if p == invalid else p for t, p in zip(targets, predictions, strict=True)]
    expected = 100 * sklearn.metrics.f1_score(targets, said, pos_label="yes")
    assert metrics.f1(LABELS)(targets, predictions)["f1"] == pytest.approx(expected)


@pytest.mark.parametrize("invalid", [None, "maybe"])
def test_matthews_invalid_predictions_are_one_more_label(invalid):
    """Gorodkin's R_K: the covariance of indicators of the labels over their standard deviations."""
    targets, predictions = drawn(LABELS, invalid)
    names = [*LABELS, "maybe"]
    true, said = (np.array([[x == y for y in names] for x in t]) for t in (targets, predictions))
    true, said = true - true.mean(axis=0), said - said.mean(axis=0)
    expected = (true * said).sum() / np.sqrt((true**2).sum() * (said**2).sum())
    found = metrics.matthews(LABELS)(targets, predictions)["matthews"]
    assert found == pytest.approx(100 * expected)


def test_matthews_with_invalid_predictions_by_hand():
    """Ten rows, six right. Gold: 3 no, 7 yes; predicted: 2 no, 4 yes, 4 invalid."""
    targets = ["yes"] * 7 + ["no"] * 3
    predictions = ["yes"] * 4 + ["maybe", "", "YES"] + ["no"] * 2 + ["?"]
    found = metrics.matthews(LABELS)(targets, predictions)["matthews"]
    # (right * rows - sum of predicted * gold)
    # / sqrt((rows^2 - sum of predicted^2) (rows^2 - sum of gold^2))
    over = math.sqrt((100 - (2**2 + 4**2 + 4**2)) * (100 - (3**2 + 7**2)))
    assert found == pytest.approx(100 * (6 * 10 - (2 * 3 + 4 * 7)) / over)
    assert found == pytest.approx(50.148, abs=1e-3)  # with the wrong label it would be 21.82


@pytest.mark.parametrize("invalid", [None, "maybe"])
def test_macro_f1_matches_scikit_learn(invalid):
    labels = ("a", "b", "c")
    targets, predictions = drawn(labels, invalid)
    expected = sklearn.metrics.f1_score(
        targets, predictions, labels=labels, average="macro", zero_division=0
    )
    found = metrics.macro_f1(labels)(targets, predictions)["f1"]
    assert found == pytest.approx(100 * expected)


def test_accuracy_ignores_only_white_space():
    found = metrics.accuracy(["yes", "yes", "yes", "no"], [" yes\n", "Yes", "yes no", "no"])
    assert found == {"accuracy": 50.0}


def test_invalid_rate_counts_non_labels():
    found = metrics.invalid_rate(LABELS)(["yes"] * 4, ["", " no ", "NO", "yes"])
    assert found == {"invalid": 50.0}


@pytest.mark.parametrize(
    ("metric", "targets", "predictions", "warnings"),
    [
        (
            metrics.matthews(LABELS),
            ["yes", "no", "yes"],
            ["yes"] * 3,
            ["matthews is undefined, because every prediction is 'yes'. It counts as 0."],
        ),
        (
            metrics.matthews(LABELS),
            ["no", "no"],
            ["yes", "no"],
            ["matthews is undefined, because every target is 'no'. It counts as 0."],
        ),
        (
            metrics.matthews(LABELS),
            ["no", "yes"],
            ["?", ""],
            ["matthews is undefined, because every prediction is no label. It counts as 0."],
        ),
        (
            metrics.f1(LABELS),
            ["no", "no"],
            ["no", "no"],
            ["f1 is undefined, because no target and no prediction is 'yes'. It counts as 0."],
        ),
        # Defined: none of two 'yes' was predicted.
        (metrics.f1(LABELS), ["yes", "no", "yes"], ["no"] * 3, []),
        (
            metrics.correlations,
            ["0.0", "1.0"],
            ["2.0", "2.0"],
            ["correlation is undefined, because every prediction is 2.0. It counts as 0."],
        ),
        (
            metrics.correlations,
            ["1.0", "1.0"],
            ["?", "2.0"],
            ["correlation is undefined, because every target is 1.0. It counts as 0."],
        ),
    ],
)
def test_undefined_metric_is_0_and_warns_once(metric, targets, predictions, warnings, caplog):
    found = metric(targets, predictions)
    marks = {name: value for name, value in found.items() if name.endswith("_undefined")}
    for name, mark in marks.items():
        assert mark == float(bool(warnings))
        assert found[name.removesuffix("_undefined")] == 0.0
    assert marks.keys() == {f"{name}_undefined" for name in found.keys() - marks - {"invalid"}}
    assert [record.getMessage() for record in caplog.records] == warnings


@pytest.mark.parametrize(
    ("metric", "first", "defined", "undefined"),
    [
        (metrics.f1(LABELS), "f1", ["yes", "no"], ["no", "no"]),
        (metrics.macro_f1(LABELS), "f1", ["yes", "no"], ["no", "no"]),
        (metrics.matthews(LABELS), "matthews", ["yes", "no"], ["no", "no"]),
        (metrics.correlations, "pearson", ["1.0", "2.0"], ["1.0", "1.0"]),
    ],
)
def test_undefined_mark_always_present_after_value(metric, first, defined, undefined):
    """All seeds have the same names, so that they can be averaged; the first name selects."""
    found, marked = metric(defined, defined), metric(undefined, undefined)
    assert list(found) == list(marked) and next(iter(found)) == first
    assert (found[f"{first}_undefined"], marked[f"{first}_undefined"]) == (0.0, 1.0)
    assert found[first] == pytest.approx(100.0)
    assert all(type(value) is float for value in [*found.values(), *marked.values()])


def test_macro_f1_warning_names_missing_labels(caplog):
    found = metrics.macro_f1(("a", "b", "c", "d"))(["a", "b"], ["a", "b"])
    assert found == {"f1": pytest.approx(200 / 4), "f1_undefined": 1.0}
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "f1 is undefined, because no target and no prediction is 'c' or 'd'"
    )


def test_of_task_warnings_and_errors_name_task_or_run(caplog):
    metric = metrics.of_task("cola", metrics.matthews(LABELS))
    metric(["yes", "no"], ["no", "no"])
    metrics.of_task("cola_k4_s0", metric)(["yes", "no"], ["no", "no"])
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("matthews of cola is undefined")
    assert second.startswith("matthews of cola_k4_s0 is undefined")
    with pytest.raises(
        ValueError, match="Task 'cola': the gold target '-1' is not one .*'no', 'yes'"
    ):
        metric(["yes", "-1"], ["no", "no"])


def test_of_task_keeps_labels_name_and_signature():
    named = metrics.of_task("cola", evaluator.with_labels(metrics.accuracy, LABELS))
    assert named.labels == LABELS and named.__name__ == "accuracy"
    assert list(inspect.signature(named).parameters) == ["targets", "predictions"]


@pytest.mark.parametrize(
    ("metric", "targets", "message"),
    [
        (
            metrics.f1(LABELS),
            ["maybe"],
            "gold target 'maybe' is not one of the labels 'no', 'yes'",
        ),
        (metrics.invalid_rate(LABELS), [""], "The gold target '' is not one of the labels"),
        (metrics.correlations, ["nan"], "The gold target 'nan' is not a number"),
        (metrics.correlations, [""], "The gold target '' is not a number"),
        (metrics.answer_overlap, [{"answers": [], "group": ""}], "The gold target '' is empty"),
    ],
)
def test_metric_unusable_gold_raises(metric, targets, message):
    with pytest.raises(ValueError, match=message):
        metric(targets, ["1"])


def by_the_books(targets, predictions):
    """Returns accuracy and F1 of 'yes' from the four counts, without a library."""
    wrong = {"no": "yes", "yes": "no"}
    pairs = [(t, p if p in LABELS else wrong[t]) for t, p in zip(targets, predictions, strict=True)]
    tp, tn = pairs.count(("yes", "yes")), pairs.count(("no", "no"))
    fp, fn = pairs.count(("no", "yes")), pairs.count(("yes", "no"))
    return (tp + tn) / len(pairs), 2 * tp / (2 * tp + fp + fn)


@pytest.mark.parametrize("invalid", [None, "maybe"])
def test_accuracy_and_f1_match_formulas(invalid):
    targets, predictions = drawn(LABELS, invalid)
    found = [
        *metrics.accuracy(targets, predictions).values(),
        metrics.f1(LABELS)(targets, predictions)["f1"],
    ]
    assert found == pytest.approx([100 * x for x in by_the_books(targets, predictions)], abs=1e-9)


def test_correlations_spearman_ties_use_mean_ranks():
    # Ranks 1, 2.5, 2.5, 4 and 1.5, 1.5, 3, 4, less 2.5: 1.5 + 2.25 over sqrt(4.5 * 4.5).
    found = metrics.correlations(["0", "1", "1", "2"], ["3", "3", "4", "5"])
    assert found["spearman"] == pytest.approx(100 * 3.75 / 4.5)


def test_correlations_match_numpy_and_ranks_by_hand():
    targets, predictions = ["0.0", "1.2", "3.4", "5.0"], ["1.0", "0.8", "2.", "100"]
    found = metrics.correlations(targets, predictions)
    expected = np.corrcoef([0, 1.2, 3.4, 5], [1, 0.8, 2, 100])[0, 1]
    assert found["pearson"] == pytest.approx(100 * expected)
    # Ranks 1 2 3 4 against 2 1 3 4: 1 - 6 * 2 / (4 * 15).
    assert found["spearman"] == pytest.approx(80.0)
    assert found["invalid"] == 0.0


@pytest.mark.parametrize("text", ["", "nan", "inf", "1_0", "3.8.", "three", "1e3", "٣"])
def test_correlations_non_number_counts_as_zero(text):
    found = metrics.correlations(["0.0", "1.0", "2.0"], [text, "1.0", "2.0"])
    assert found["pearson"] == pytest.approx(100.0)
    assert found["invalid"] == pytest.approx(100 / 3)


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
        ("a an the A An THE", ""),
        ("theatre and ana", "theatre and ana"),  # articles are whole words
        ("the-cat", "thecat"),  # punctuation goes first, and no space comes for it
        ("a.m.", "am"),
        ("$1,000.50", "100050"),
        ("1\u00a0000\u3000kg", "1 000 kg"),  # no-break and ideographic space
        ("“the”  cat", "“ ” cat"),  # only ASCII punctuation is dropped
        ("ÉTÉ", "été"),
        ("l'a b", "la b"),
        ("der Straße", "der straße"),
    ],
)
def test_normalized_answer_text(text, expected):
    assert metrics.normalized(text) == expected


@pytest.mark.parametrize(
    ("answer", "prediction", "expected"),
    [
        ("a big red cat", "red cat", 0.8),
        ("cat cat", "cat", 2 / 3),
        ("the", "the", 0.0),  # both become empty: 0 in the official script
        ("cat", "", 0.0),
        ("", "", 0.0),
        ("the cat sat", "cat sat the mat", 0.8),  # 2 shared of 2 and 3
        ("été", "ete", 0.0),
    ],
)
def test_word_f1_by_hand(answer, prediction, expected):
    assert metrics.word_f1(answer, prediction) == pytest.approx(expected)


def question(*answers, group=""):
    return {"answers": list(answers), "group": group}


@pytest.mark.parametrize(
    ("answer", "prediction", "match", "overlap"),
    [
        ("The cat.", "cat", 100.0, 100.0),
        ("the", "a", 100.0, 0.0),  # both empty: equal, and no word is shared
        ("cat", "", 0.0, 0.0),
        ("été", "Été!", 100.0, 100.0),
        ("10 %", "10", 100.0, 100.0),
        ("U.S.", "U S", 0.0, 0.0),
    ],
)
def test_answer_overlap_edge_cases_of_squad_script(answer, prediction, match, overlap):
    found = metrics.answer_overlap([question(answer)], [prediction])
    assert found == {"f1": overlap, "exact_match": match}


def test_answer_overlap_best_answer_counts():
    targets = [question("a cat", "big cat"), question("dog")]
    found = metrics.answer_overlap(targets, ["Big cat.", "big dog"])
    assert found == {"f1": pytest.approx(100 * (1 + 2 / 3) / 2), "exact_match": 50.0}


def test_answer_overlap_question_with_several_rows_counts_once():
    once = [question("Ann", "Bob", group="1/2"), question("Ann", "Bob", group="1/2")]
    other = question("Cy", group="1/3")
    found = metrics.answer_overlap([*once, other], ["Bob", "Bob", "wrong"])
    assert found == {"f1": 50.0, "exact_match": 50.0}


def test_gold_answers_keep_all_answers():
    example = {"answers": np.array([b"Ann", "José".encode()], object), "group": b"1/2"}
    assert metrics.gold_answers("Ann", example=example, is_target=True) == {
        "answers": ["Ann", "José"],
        "group": "1/2",
    }
    assert metrics.gold_answers("Bob", example=example, is_target=False) == "Bob"
