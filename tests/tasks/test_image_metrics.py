"""Metrics of image classification, against scikit-learn and cases computed by hand."""

import inspect
import operator
import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from mpt_jax.core.runs import Runs
from mpt_jax.models.class_texts import TaskClasses
from mpt_jax.tasks import image_metrics, text_metrics
from tests.fixtures import tiny_clip

DRAW = np.random.default_rng(0)
LABELS = DRAW.integers(0, 5, 200)
LABELS[LABELS == 3] = 2  # class 3 has no example
SCORES = DRAW.normal(size=(200, 6)) + 1.2 * np.eye(6)[LABELS]
TIED = np.round(SCORES)  # with many equal scores
HOT = (DRAW.random((200, 6)) < 0.3).astype(np.int64)
HOT[:, 4] = 0


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scores", [SCORES, TIED])
def test_accuracies_equal_those_of_sklearn(scores):
    best = scores.argmax(axis=1)
    expected = 100 * sklearn_metrics.accuracy_score(LABELS, best)
    with warnings.catch_warnings(action="ignore"):  # class 5 is predicted but has no example
        balanced = 100 * sklearn_metrics.balanced_accuracy_score(LABELS, best)
    close(image_metrics.accuracy(LABELS, scores)["accuracy"], expected)
    close(image_metrics.mean_per_class(LABELS.tolist(), list(scores))["mean_per_class"], balanced)
    close(image_metrics.id_accuracy(LABELS, best)["accuracy"], expected)
    close(image_metrics.id_mean_per_class(LABELS, best.tolist())["mean_per_class"], balanced)
    assert abs(expected - balanced) > 0.1


@pytest.mark.parametrize("scores", [SCORES, TIED, SCORES.astype(np.float32)])
@pytest.mark.parametrize("labels", [HOT, LABELS, HOT.astype(np.float32)])
def test_average_precision_equals_that_of_sklearn(labels, scores):
    hot = labels if labels.ndim == 2 else np.eye(6, dtype=int)[labels]
    ours = image_metrics.average_precisions(labels, scores)
    present = hot.any(axis=0)
    expected = [
        sklearn_metrics.average_precision_score(hot[:, c], scores[:, c])
        for c in np.flatnonzero(present)
    ]
    close(ours[present], expected)
    assert np.isnan(ours[~present]).all() and not present.all()
    values = image_metrics.mean_average_precision(list(labels), scores)
    close(values["map"], 100 * np.mean(expected))
    assert list(values) == ["map", "map_classes"] and values["map_classes"] == present.sum()


def reference_11point(hot, scores):
    """From the curve of scikit-learn, with the recalls rounded to undo binary fractions."""
    precision, recall, _ = sklearn_metrics.precision_recall_curve(hot, scores)
    thresholds = [round(0.1 * t, 10) for t in range(11)]
    return np.mean([precision[:-1][np.round(recall[:-1], 10) >= t].max() for t in thresholds])


@pytest.mark.parametrize("scores", [SCORES, TIED])
def test_11point_precision_equals_definition(scores):
    used = [0, 1, 2, 3, 5]
    expected = [reference_11point(HOT[:, c], scores[:, c]) for c in used]
    close(image_metrics.interpolated_precisions(HOT, scores)[used], expected)
    values = image_metrics.map_11point(HOT, scores)
    close(values["map_11point"], 100 * np.mean(expected))
    assert values["map_11point_classes"] == 5


def test_precisions_of_hand_case():
    """Ranked + - + + -: precision 1, 1/2, 2/3, 3/4, 3/5 at recall 1/3, 1/3, 2/3, 1, 1."""
    labels = np.array([[1], [0], [1], [1], [0]])
    scores = np.array([[5.0], [4.0], [3.0], [2.0], [1.0]])
    close(image_metrics.average_precisions(labels, scores), [(1 + 2 / 3 + 3 / 4) / 3])
    # Recall at least 0, .1, .2, .3: precision 1; at least .4 ... 1: 3/4.
    close(image_metrics.interpolated_precisions(labels, scores), [(4 * 1 + 7 * 0.75) / 11])
    # All scores are equal: one point of precision 3/5 and recall 1.
    for function in (image_metrics.average_precisions, image_metrics.interpolated_precisions):
        close(function(labels, np.zeros((5, 1))), [0.6])


def test_11point_recall_of_three_tenths_counts_for_threshold_three_tenths():
    """Ten positives, three of them first: 0.1 * 3 is greater than 3 / 10 in floating point."""
    labels = np.array([[1]] * 3 + [[0]] * 10 + [[1]] * 7)
    scores = -np.arange(20.0)[:, None]
    close(image_metrics.interpolated_precisions(labels, scores), [(4 * 1 + 7 * 10 / 20) / 11])


@pytest.mark.parametrize("decimals", [8, 0])
def test_roc_auc_equals_that_of_sklearn(decimals):
    labels = (LABELS > 1).astype(np.int32)
    scores = np.round(SCORES[:, :2], decimals)
    expected = sklearn_metrics.roc_auc_score(labels, scores[:, 1] - scores[:, 0])
    close(image_metrics.roc_auc(labels, scores)["roc_auc"], 100 * expected)
    single = sklearn_metrics.roc_auc_score(labels, scores[:, 0])
    close(image_metrics.roc_auc_score(labels, scores[:, 0]), single)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_f1_equals_that_of_sklearn(threshold):
    predicted = 1 / (1 + np.exp(-SCORES)) > threshold
    used = [0, 1, 2, 3, 5]
    f1 = sklearn_metrics.f1_score
    options = {"average": "macro", "zero_division": 0}
    precision = sklearn_metrics.precision_score(HOT[:, used], predicted[:, used], **options)
    recall = sklearn_metrics.recall_score(HOT[:, used], predicted[:, used], **options)
    log_probabilities = -np.logaddexp(0, -SCORES)
    values = image_metrics.f1_at(threshold)(HOT, log_probabilities)
    assert list(values) == ["of1", "cf1_mean_of_f1", "cf1_of_means"]
    close(values["of1"], 100 * f1(HOT, predicted, average="micro"))
    close(values["cf1_mean_of_f1"], 100 * f1(HOT[:, used], predicted[:, used], **options))
    close(values["cf1_of_means"], 100 * 2 * precision * recall / (precision + recall))
    assert len({round(v, 3) for v in values.values()}) == 3


def test_f1_without_predictions_is_zero():
    values = image_metrics.f1_at(0.5)([[1, 0], [0, 1]], [[-1.0, -1.0], [-1.0, -np.inf]])
    assert values == {"of1": 0.0, "cf1_mean_of_f1": 0.0, "cf1_of_means": 0.0}


@pytest.mark.slow
def test_f1_of_the_scores_of_a_model_is_that_of_its_sigmoids():
    tags = TaskClasses("tags", ("cat", "dog", "small bird"), ("a {}.",), multi_label=True)
    model = tiny_clip.model(runs=Runs(["tags"]), texts=tiny_clip.texts(tasks=(tags,)))
    params, batch = tiny_clip.params(model), tiny_clip.batch([0] * 12, [-1] * 12)
    probabilities = 1 / (1 + np.exp(-np.asarray(model.own_logits(params, batch), np.float64)))
    threshold = float(np.median(probabilities))
    hot = np.random.default_rng(1).random((12, 3)) < 0.5
    expected = sklearn_metrics.f1_score(hot, probabilities > threshold, average="micro")
    scores = np.asarray(model.score_batch(params, batch))
    found = image_metrics.f1_at(threshold)(hot.astype(int), scores)["of1"]
    np.testing.assert_allclose(found, 100 * expected, rtol=1e-12)
    assert found > 20


def test_f1_of_logits_fails():
    with pytest.raises(ValueError, match=r"score of example 0 for class 1 is 2.0, but log prob"):
        image_metrics.f1_at(0.5)([[1, 0]], [[0.0, 2.0]])


def test_calibration_error_of_hand_case():
    """Confidences .9, .9, .6, .6 with 2 and 1 hits: (|1.8 - 2| + |1.2 - 1|) / 4 = 0.1; a confidence
    of exactly 1 is in the last bin."""
    scores = np.log([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.6, 0.4]])
    close(image_metrics.calibration([0, 1, 0, 1], scores)["calibration_error"], 10.0)
    close(image_metrics.calibration([0, 1, 0, 1], scores + 7.0)["calibration_error"], 10.0)
    certain = np.array([[0.0, -np.inf], [0.0, -np.inf]])
    close(image_metrics.calibration_error(np.array([0, 1]), certain), 0.5)


def test_calibration_error_equals_loop_over_bins():
    shares = np.exp(SCORES) / np.exp(SCORES).sum(axis=1, keepdims=True)
    confidence, hit = shares.max(axis=1), shares.argmax(axis=1) == LABELS
    total = 0.0
    for low in np.linspace(0, 0.9, 10):
        inside = (confidence > low) & (confidence <= low + 0.1)
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    close(image_metrics.calibration_error(LABELS, SCORES), total)


def test_harmonic_mean():
    close(image_metrics.harmonic_mean(82.69, 63.22), 2 * 82.69 * 63.22 / (82.69 + 63.22))
    assert image_metrics.harmonic_mean(50.0, 0.0) == image_metrics.harmonic_mean(0.0, 0.0) == 0.0
    for pair in ((-1.0, 2.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="needs two values of at least 0, got"):
            image_metrics.harmonic_mean(*pair)


SINGLE = [image_metrics.accuracy, image_metrics.mean_per_class, image_metrics.calibration]
RANKED = [image_metrics.mean_average_precision, image_metrics.map_11point, image_metrics.f1_at(0.5)]
IDS = [image_metrics.id_accuracy, image_metrics.id_mean_per_class]
PAIR = np.zeros((2, 2))
name_of = operator.attrgetter("__name__")
NAN = np.array([[0.0, 0.0], [np.nan, 0.0]])


@pytest.mark.parametrize(
    "metric", [*SINGLE, *RANKED, image_metrics.roc_auc], ids=lambda x: x.__name__
)
@pytest.mark.parametrize(
    ("targets", "scores", "message"),
    [
        (
            [],
            np.zeros((0, 2)),
            "There are no examples to score. Evaluate a split that is not empty",
        ),
        ([0, 1], np.zeros((3, 2)), "There are 2 labels but 3 scores or predictions. Pass one for"),
        ([0, 1], NAN, "A score of example 1 is NaN. Check the parameters"),
        ([0, 2], PAIR, "label of example 1 is 2, but ids of 2 classes are 0 to 1. Correct the"),
        ([-1, 1], PAIR, "The label of example 0 is -1, which is negative. Correct the labels"),
        ([0.5, 1.0], PAIR, "Labels must be integers, got float64"),
    ],
)
def test_unusable_arrays_fail(metric, targets, scores, message):
    with pytest.raises(ValueError, match=message):
        metric(targets, scores)


@pytest.mark.parametrize("metric", IDS)
def test_unusable_ids_fail(metric):
    for targets, predictions, message in [
        ([], [], "no examples"),
        ([0], [0, 1], "There are 1 labels but 2"),
        ([-1], [0], "is -1, which is negative"),
        ([[0, 1]], [0], r"needs one class per example, but the labels have the shape \(1, 2\)"),
        ([0], [[0, 1]], r"but the predictions have the shape \(1, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric(targets, predictions)


def test_undefined_metrics_fail():
    for metric in RANKED:
        with pytest.raises(ValueError, match="No example is positive for any of the 2 classes"):
            metric(np.zeros((2, 2), int), PAIR)
        with pytest.raises(ValueError, match="label of example 1 for class 0 is 2, not 0 or 1"):
            metric([[0, 1], [2, 0]], PAIR)
        with pytest.raises(
            ValueError, match=r"have the shape \(2, 3\), but the scores have \(2, 2"
        ):
            metric(np.zeros((2, 3), int), PAIR)
        with pytest.raises(ValueError, match=r"Scores must have the shape \[N, C\], got \[2\]"):
            metric([0, 1], [0.0, 1.0])
    with pytest.raises(ValueError, match="The ROC curve is undefined, because every label is 1"):
        image_metrics.roc_auc([1, 1], PAIR)
    with pytest.raises(ValueError, match="ROC curve needs one label per example"):
        image_metrics.roc_auc([[1, 0], [0, 1]], PAIR)
    with pytest.raises(ValueError, match="needs two classes, but the scores have 3"):
        image_metrics.roc_auc([1, 0], np.zeros((2, 3)))
    with pytest.raises(ValueError, match="The highest score of example 1 is -inf"):
        image_metrics.calibration([0, 0], [[0.0, 1.0], [-np.inf, -np.inf]])
    with pytest.raises(ValueError, match="threshold of F1 must be between 0 and 1, got 80"):
        image_metrics.f1_at(80)


def test_errors_name_the_task():
    metric = text_metrics.of_task("pets", image_metrics.accuracy)
    with pytest.raises(ValueError, match="Task 'pets': there are no examples to score."):
        metric([], np.zeros((0, 2)))


@pytest.mark.parametrize(
    "metric", [*SINGLE, *RANKED, *IDS, image_metrics.roc_auc], ids=lambda x: x.__name__
)
def test_metrics_follow_the_conventions_of_seqio(metric):
    """SeqIO tells metrics apart by their arguments; `mpt-jax tasks` shows the names of values."""
    kind = "predictions" if metric in IDS else "scores"
    assert list(inspect.signature(metric).parameters) == ["targets", kind]
    scores = np.array([0, 1]) if metric in IDS else np.log([[0.9, 0.1], [0.1, 0.9]])
    values = metric([0, 1], scores)
    assert tuple(values) == text_metrics.value_names(metric)
    assert all(isinstance(value, float | int) for value in values.values())
