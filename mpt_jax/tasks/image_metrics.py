"""Metrics of image classification over class scores [N, C] or predicted class ids [N].

The first part of the module has functions of arrays that return fractions. The second part has
SeqIO metrics, `(targets, scores)` or `(targets, predictions) -> {name: value}`, in percent. A
target is a class id, or a multi-hot row [C] if an example may have several classes.

Scores are log probabilities, as jobs get them from `score_batch`: over the classes of an example,
or of each class separately in a multi-label task. Metrics that only compare scores accept others.

Labels out of range, NaN scores, an empty set, and labels for which a metric is undefined (no class
with a positive example, for instance) raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import scipy

from mpt_jax.tasks import text_metrics

BINS = 10  # of the calibration error
_FIX_DATA = "Correct the labels of the data set."
_REMOVE_ROC = "Remove roc_auc from the metric_fns of the task."
_FIX_SCORES = "Check the parameters that the scores were computed with."


# --- Functions of arrays ---------------------------------------------------------------------


def accuracy_score(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Returns the fraction of examples whose predicted class [N] equals their label [N]."""
    return float(np.mean(_paired(labels, predicted)))


def mean_recall(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Returns the mean over classes of the fraction of their examples that are predicted correctly
    (balanced accuracy). Classes without examples are excluded."""
    hits = _paired(labels, predicted)
    _, class_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return float(np.mean(np.bincount(class_of, weights=hits) / counts))


def average_precisions(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns each class's area under the precision-recall curve, `sum_k (R_k - R_{k-1}) P_k`.

    The curve has a point for each distinct score, so the order of examples with equal scores has no
    influence.

    Args:
        labels: class ids [N] or multi-hot [N, C].
        scores: [N, C].

    Returns:
        [C], NaN for classes without a positive example.
    """

    def area(true: np.ndarray, chosen: np.ndarray, positives: int) -> float:
        return float(np.sum(np.diff(true, prepend=0) / positives * (true / chosen)))

    return _of_each_class(labels, scores, area)


def interpolated_precisions(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns each class's 11-point average precision, as in PASCAL VOC 2007: the mean over
    t = 0, 0.1, ..., 1 of the highest precision at a recall of at least t.

    Arguments and result are those of `average_precisions`.
    """

    def mean(true: np.ndarray, chosen: np.ndarray, positives: int) -> float:
        precision = true / chosen
        # In integers, since a recall of 3 / 10 is less than a sum of three tenths.
        return float(np.mean([precision[10 * true >= t * positives].max() for t in range(11)]))

    return _of_each_class(labels, scores, mean)


def roc_auc_score(labels: np.ndarray, scores: np.ndarray) -> float:
    """Returns the probability that a positive example has a higher score than a negative one, where
    equal scores count half.

    Args:
        labels: 0 or 1 [N].
        scores: [N], or the scores of both classes [N, 2].
    """
    if scores.ndim == 2 and scores.shape[1] != 2:
        _fail(
            f"The ROC curve needs two classes, but the scores have {scores.shape[1]}. {_REMOVE_ROC}"
        )
    _check(labels, scores, classes=2)
    if labels.ndim != 1:
        _fail(f"The ROC curve needs one label per example, got multi-hot labels. {_REMOVE_ROC}")
    margins = scores if scores.ndim == 1 else scores[:, 1] - scores[:, 0]
    positives = int(np.sum(labels))
    negatives = len(labels) - positives
    if not positives or not negatives:
        _fail(f"The ROC curve is undefined, because every label is {labels[0]}. {_FIX_DATA}")
    ranks = scipy.stats.rankdata(margins)[labels == 1]
    return float((ranks.sum() - positives * (positives + 1) / 2) / (positives * negatives))


def multilabel_f1(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """Returns F1 of the classes whose probability exceeds a threshold.

    Classes without a positive example count for `of1` only. A precision without predictions is 0.

    Args:
        labels: multi-hot [N, C].
        scores: the log probability of each class [N, C], at most 0.
        threshold: the probability above which a class is predicted.

    Returns:
        `of1`: F1 of all decisions; `cf1_mean_of_f1`: the mean of the classes' F1, as in MULTI-LANE;
        `cf1_of_means`: F1 of the classes' mean precision and mean recall, as in the literature of
        multi-label classification.
    """
    truth = _multi_hot(labels, scores)
    if (positive := scores > 0).any():
        row, column = map(int, np.argwhere(positive)[0])
        _fail(
            f"The score of example {row} for class {column} is {scores[row, column]}, but log "
            "probabilities are at most 0. Pass the log sigmoid of logits."
        )
    predicted = scores.astype(np.float64) > np.log(threshold)
    hits = (truth & predicted).sum(axis=0)
    positives, chosen = truth.sum(axis=0), predicted.sum(axis=0)
    used = _classes_with_positives(positives)
    precision = _ratio(hits, chosen)[used]
    recall = _ratio(hits, positives)[used]
    return {
        "of1": float(_ratio(2 * hits.sum(), positives.sum() + chosen.sum())),
        "cf1_mean_of_f1": float(np.mean(_ratio(2 * hits, positives + chosen)[used])),
        "cf1_of_means": harmonic_mean(float(precision.mean()), float(recall.mean())),
    }


def calibration_error(labels: np.ndarray, scores: np.ndarray, bins: int = BINS) -> float:
    """Returns the expected calibration error: the mean over bins of confidence, weighted by their
    sizes, of the difference between accuracy and mean confidence.

    Args:
        labels: class ids [N].
        scores: log probabilities [N, C]; the confidence is the highest probability. They are
            normalized, so logits have the same error.
        bins: the number of bins of equal width; a bin includes its upper bound.
    """
    hits = _paired(labels, _best(labels, scores))
    best = scores.max(axis=1, keepdims=True)
    if not np.all(np.isfinite(best)):
        row = int(np.argmin(np.isfinite(best[:, 0])))
        _fail(f"The highest score of example {row} is {best[row, 0]}. {_FIX_SCORES}")
    confidence = scipy.special.softmax(scores.astype(np.float64), axis=1).max(axis=1)
    bin_of = np.minimum(np.ceil(confidence * bins).astype(int), bins) - 1
    gaps = np.bincount(bin_of, weights=hits - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def harmonic_mean(base: float, new: float) -> float:
    """Returns the harmonic mean of two values of at least 0, such as the accuracies of base and new
    classes; 0 if one of them is 0."""
    if not (base >= 0 and new >= 0):
        _fail(
            f"The harmonic mean needs two values of at least 0, got {base} and {new}. Pass two "
            "accuracies."
        )
    return 2 * base * new / (base + new) if base > 0 and new > 0 else 0.0


# --- SeqIO metrics ---------------------------------------------------------------------------


def accuracy(targets: Sequence[int], scores: Any) -> dict[str, float]:
    """Returns the percentage of examples whose highest score [N, C] is that of their class; of
    equal scores, the first one is the highest."""
    labels, values = _arrays(targets, scores)
    return {"accuracy": 100 * accuracy_score(labels, _best(labels, values))}


def mean_per_class(targets: Sequence[int], scores: Any) -> dict[str, float]:
    """Returns the accuracy averaged over classes with examples; scores as in `accuracy`."""
    labels, values = _arrays(targets, scores)
    return {"mean_per_class": 100 * mean_recall(labels, _best(labels, values))}


@text_metrics.named("accuracy")
def id_accuracy(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Returns the percentage of predicted class ids [N] that equal their target."""
    return {"accuracy": 100 * accuracy_score(*_arrays(targets, predictions))}


@text_metrics.named("mean_per_class")
def id_mean_per_class(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Returns the accuracy of predicted class ids [N], averaged over classes with examples."""
    return {"mean_per_class": 100 * mean_recall(*_arrays(targets, predictions))}


@text_metrics.named("map", "map_classes")
def mean_average_precision(targets: Sequence[Any], scores: Any) -> dict[str, float]:
    """Returns mAP, the mean of `average_precisions`, and the number of classes it is the mean of:
    those with a positive example."""
    return _mean_of_classes("map", average_precisions(*_arrays(targets, scores)))


@text_metrics.named("map_11point", "map_11point_classes")
def map_11point(targets: Sequence[Any], scores: Any) -> dict[str, float]:
    """Returns the mean of `interpolated_precisions`, and the number of classes it is the mean of:
    those with a positive example."""
    return _mean_of_classes("map_11point", interpolated_precisions(*_arrays(targets, scores)))


def roc_auc(targets: Sequence[int], scores: Any) -> dict[str, float]:
    """Returns the area under the ROC curve of two classes, of which 1 is the positive one."""
    return {"roc_auc": 100 * roc_auc_score(*_arrays(targets, scores))}


def f1_at(threshold: float) -> Callable[[Sequence[Any], Any], dict[str, float]]:
    """Returns a metric: `multilabel_f1` at a threshold between 0 and 1."""
    if not 0 < threshold < 1:
        raise ValueError(
            f"The threshold of F1 must be between 0 and 1, got {threshold}. Correct the metric_fns "
            "of the task."
        )

    @text_metrics.named("of1", "cf1_mean_of_f1", "cf1_of_means")
    def f1(targets: Sequence[Any], scores: Any) -> dict[str, float]:
        values = multilabel_f1(*_arrays(targets, scores), threshold)
        return {name: 100 * value for name, value in values.items()}

    return f1


@text_metrics.named("calibration_error")
def calibration(targets: Sequence[int], scores: Any) -> dict[str, float]:
    """Returns the expected calibration error in percent, with 10 bins."""
    return {"calibration_error": 100 * calibration_error(*_arrays(targets, scores))}


# --- Checks ----------------------------------------------------------------------------------


def _fail(message: str) -> NoReturn:
    task = text_metrics._TASK.get()
    raise ValueError(f"Task {task!r}: {message[0].lower()}{message[1:]}" if task else message)


def _arrays(targets: Sequence[Any], scores: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(targets), np.asarray(scores)


def _check(labels: np.ndarray, scores: np.ndarray, classes: int | None = None) -> None:
    """Checks labels [N] or [N, C] and scores [N] or [N, C]; `classes` is the number of classes if
    they are not [N, C]."""
    if not len(labels):
        _fail("There are no examples to score. Evaluate a split that is not empty.")
    if len(labels) != len(scores):
        _fail(
            f"There are {len(labels)} labels but {len(scores)} scores or predictions. Pass one for "
            "each example."
        )
    if np.isnan(scores).any():
        row = int(np.argmax(np.isnan(scores).reshape(len(scores), -1).any(axis=1)))
        _fail(f"A score of example {row} is NaN. {_FIX_SCORES}")
    if labels.ndim == 2:
        _check_multi_hot(labels, scores)
    elif not np.issubdtype(labels.dtype, np.integer):
        _fail(f"Labels must be integers, got {labels.dtype}. {_FIX_DATA}")
    elif (labels < 0).any():
        row = int(np.argmax(labels < 0))
        _fail(f"The label of example {row} is {labels[row]}, which is negative. {_FIX_DATA}")
    elif (classes := classes or (scores.shape[1] if scores.ndim == 2 else None)) is not None:
        if labels.max() >= classes:
            row = int(np.argmax(labels >= classes))
            _fail(
                f"The label of example {row} is {labels[row]}, but ids of {classes} classes are 0 "
                f"to {classes - 1}. {_FIX_DATA}"
            )


def _check_multi_hot(labels: np.ndarray, scores: np.ndarray) -> None:
    if labels.shape != scores.shape:
        _fail(
            f"Multi-hot labels have the shape {labels.shape}, but the scores have {scores.shape}. "
            "Pass a label and a score for each example and class."
        )
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        row, column = map(int, np.argwhere(wrong)[0])
        value = labels[row, column]
        _fail(f"The label of example {row} for class {column} is {value}, not 0 or 1. {_FIX_DATA}")


def _paired(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns which predicted class ids [N] equal their label [N]; checks both."""
    for name, values in (("labels", labels), ("predictions", predicted)):
        if values.ndim != 1:
            _fail(
                f"Accuracy needs one class per example, but the {name} have the shape "
                f"{values.shape}. For tasks with several classes per example, set metric_fns to "
                "('map',)."
            )
    _check(labels, predicted)
    return labels == predicted


def _best(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the class ids [N] of the highest scores [N, C]; checks labels and scores."""
    if scores.ndim != 2:
        _fail(f"Scores must have the shape [N, C], got {list(scores.shape)}. Pass class scores.")
    _check(labels, scores)
    return np.argmax(scores, axis=1)


def _multi_hot(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns labels as booleans [N, C]; checks labels and scores."""
    if scores.ndim != 2:
        _fail(f"Scores must have the shape [N, C], got {list(scores.shape)}. Pass class scores.")
    _check(labels, scores)
    return labels == 1 if labels.ndim == 2 else labels[:, None] == np.arange(scores.shape[1])


def _classes_with_positives(positives: np.ndarray) -> np.ndarray:
    """Returns which classes have positive examples, given their counts [C]."""
    if not positives.any():
        _fail(f"No example is positive for any of the {len(positives)} classes. {_FIX_DATA}")
    return positives > 0


def _of_each_class(
    labels: np.ndarray, scores: np.ndarray, value: Callable[[np.ndarray, np.ndarray, int], float]
) -> np.ndarray:
    """Returns a value of each class's precision-recall curve, [C]; NaN without positive examples.

    `value` is called with the number of true positives and of examples with a score of at least
    each distinct score, highest first, and with the number of positive examples.
    """
    truth = _multi_hot(labels, scores)
    used = _classes_with_positives(truth.sum(axis=0))
    result = np.full(scores.shape[1], np.nan)
    for column in np.flatnonzero(used):
        order = np.argsort(-scores[:, column], kind="stable")
        ranked = scores[order, column]
        last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        true = np.cumsum(truth[order, column])
        result[column] = value(true[last], last + 1, int(true[-1]))
    return result


def _mean_of_classes(name: str, values: np.ndarray) -> dict[str, float]:
    return {
        name: 100 * float(np.nanmean(values)),
        f"{name}_classes": int(np.sum(~np.isnan(values))),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole, and 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) != 0)
