"""Metrics of decoded text, all in percent. Invalid predictions count as wrong.

Each metric is a SeqIO metric `(targets, predictions) -> {name: value}`, or a function that returns
one. The first metric of a task selects its best step. Accuracy, F1 and Matthews' correlation are
computed by scikit-learn, Pearson's and Spearman's by SciPy; answer overlap is implemented here.

An undefined metric, such as a correlation with a constant, is 0 and logs a warning with the reason.
Every metric that can be undefined has a second value, `<metric>_undefined`, which is 1 if the
metric is undefined and 0 otherwise, so that a table can distinguish it from a measured 0. A gold
target that cannot be scored raises ValueError.
"""

from __future__ import annotations

import collections
import contextvars
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy
from absl import logging

Metric = Callable[[Sequence[Any], Sequence[str]], dict[str, float]]

_TASK: contextvars.ContextVar[str] = contextvars.ContextVar("task", default="")


def of_task(name: str, metric: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the metric with the task's name in its warnings and errors. If `of_task` is applied
    twice, the outer name is shown."""

    @functools.wraps(metric)
    def named(*args: Any, **kwargs: Any) -> Any:
        token = _TASK.set(_TASK.get() or name)
        try:
            return metric(*args, **kwargs)
        finally:
            _TASK.reset(token)

    return named


def named(*names: str) -> Callable[[Metric], Metric]:
    """Returns a decorator that records the names of a metric's values for `mpt-jax tasks`. Without
    it, `value_names` returns the name of the function."""

    def record(metric: Metric) -> Metric:
        metric.value_names = names  # type: ignore[attr-defined]
        return metric

    return record


def value_names(metric: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names under which the log shows the values of a metric."""
    return getattr(metric, "value_names", (getattr(metric, "__name__", str(metric)),))


def marked(scores: Mapping[str, float], why: str | None, what: str = "") -> dict[str, float]:
    """Adds an `<name>_undefined` for each score, and logs a warning if scores are undefined.

    Args:
        scores: Name -> percent, the most important score first.
        why: The reason why the scores are undefined; None if they are defined.
        what: The name in the warning; '' for the first name in `scores`.
    """
    if why is not None:
        task = f" of {_TASK.get()}" if _TASK.get() else ""
        name = what or next(iter(scores))
        logging.warning("%s%s is undefined, because %s. It counts as 0.", name, task, why)
    return {**scores, **{f"{name}_undefined": float(why is not None) for name in scores}}


def _unusable(target: Any, what: str) -> ValueError:
    start = f"Task {_TASK.get()!r}: the" if _TASK.get() else "The"
    return ValueError(
        f"{start} gold target {target!r} is {what}, so predictions cannot be scored. Correct it in "
        "the data."
    )


def _constant(
    targets: np.ndarray, predictions: np.ndarray, shown: Callable[[Any], str] = str
) -> str | None:
    """Returns a clause that names the first constant array and its value; None if there is none."""
    for what, values in (("target", targets), ("prediction", predictions)):
        if np.ptp(values) == 0:
            return f"every {what} is {shown(values[0])}"
    return None


# --- Labels ----------------------------------------------------------------------------------


def label_numbers(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns targets and predictions as label numbers, with -1 for invalid predictions.

    Raises:
        ValueError: a target is not a label.
    """
    number = {label: i for i, label in enumerate(labels)}
    for target in targets:
        if target not in number:
            raise _unusable(target, f"not one of the labels {', '.join(map(repr, labels))}")
    predicted = np.array([number.get(prediction.strip(), -1) for prediction in predictions])
    return np.array([number[target] for target in targets]), predicted


def _two_sided(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns targets and predictions as numbers of two labels. Invalid predictions become the
    wrong label, as in T5."""
    true, predicted = label_numbers(targets, predictions, labels)
    return true, np.where(predicted < 0, 1 - true, predicted)


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions that equal their target, ignoring outer white space."""
    golds = [target.strip() for target in targets]
    number = {gold: i for i, gold in enumerate(dict.fromkeys(golds))}
    predicted = [number.get(prediction.strip(), -1) for prediction in predictions]
    true = [number[gold] for gold in golds]
    return {"accuracy": 100 * float(_sklearn_metrics().accuracy_score(true, predicted))}


def _sklearn_metrics() -> Any:
    """Returns scikit-learn's metrics. Their import takes half a second, which would delay the start
    of training. SciPy imports its own modules at the first use."""
    from sklearn import metrics

    return metrics


def invalid_rate(labels: Sequence[str]) -> Metric:
    """Returns a metric: the percentage of predictions that are not a label."""

    def invalid(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        _, predicted = label_numbers(targets, predictions, labels)
        return {"invalid": 100 * float(np.mean(predicted < 0))}

    return invalid


def f1(labels: Sequence[str]) -> Metric:
    """Returns a metric: F1 of the second of two labels (duplicate, equivalent, True).

    An invalid prediction counts as the wrong label, as in T5.
    """

    @named("f1")
    def label_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        return f1_of_labels(*_two_sided(targets, predictions, labels), labels, [1])

    return label_f1


def macro_f1(labels: Sequence[str]) -> Metric:
    """Returns a metric: the mean F1 of the labels. Invalid predictions count for no label."""

    @named("f1")
    def mean_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        numbers = label_numbers(targets, predictions, labels)
        return f1_of_labels(*numbers, labels, range(len(labels)))

    return mean_f1


def f1_of_labels(
    true: np.ndarray, said: np.ndarray, labels: Sequence[str], scored: Sequence[int]
) -> dict[str, float]:
    """Returns the mean F1 of the labels in `scored`, and whether it is undefined.

    A label without targets and predictions has F1 0 and makes the mean undefined.

    Args:
        true, said: The label numbers [n] of targets and predictions, with -1 for an invalid
            prediction.
        labels: The name of each label number.
        scored: The numbers of the labels to average over.
    """
    absent = sorted(set(scored) - set(true.tolist()) - set(said.tolist()))
    names = " or ".join(repr(labels[number]) for number in absent)
    mean = _sklearn_metrics().f1_score(
        true, said, labels=list(scored), average="macro", zero_division=0
    )
    why = f"no target and no prediction is {names}" if absent else None
    return marked({"f1": 100 * float(mean)}, why)


def matthews(labels: Sequence[str]) -> Metric:
    """Returns a metric: Matthews' correlation. Invalid predictions count as a label, as in T5.

    The correlation is 0 if all predictions, or all targets, are equal.
    """

    def shown(number: int) -> str:
        return repr(labels[number]) if number >= 0 else "no label"

    @named("matthews")
    def matthews_correlation(
        targets: Sequence[str], predictions: Sequence[str]
    ) -> dict[str, float]:
        true, predicted = label_numbers(targets, predictions, labels)
        why = _constant(true, predicted, shown)
        value = 0.0 if why else float(_sklearn_metrics().matthews_corrcoef(true, predicted))
        return marked({"matthews": 100 * value}, why)

    return matthews_correlation


# --- Numbers ---------------------------------------------------------------------------------

_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


@named("pearson", "spearman", "invalid")
def correlations(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns Pearson's and Spearman's correlation, and the share of non-numeric predictions.

    A prediction that is not a number counts as 0. A correlation with a constant is 0.

    Raises:
        ValueError: a target is not a number.
    """
    matches = [_NUMBER.fullmatch(prediction.strip()) for prediction in predictions]
    predicted = np.array([float(match.group()) if match else 0.0 for match in matches])
    true = np.array([_gold_number(target) for target in targets])
    why = _constant(true, predicted)
    scores = {
        "pearson": 0.0 if why else 100 * float(scipy.stats.pearsonr(true, predicted).statistic),
        "spearman": 0.0 if why else 100 * float(scipy.stats.spearmanr(true, predicted).statistic),
    }
    invalid = 100 * float(np.mean([match is None for match in matches]))
    return {**marked(scores, why, "correlation"), "invalid": invalid}


def _gold_number(target: str) -> float:
    if _NUMBER.fullmatch(target.strip()) is None:
        raise _unusable(target, "not a number")
    return float(target)


# --- Answers ---------------------------------------------------------------------------------


def normalized(answer: str) -> str:
    """Returns an answer as normalized by SQuAD's script: in lower case, without punctuation,
    articles and repeated spaces."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def word_f1(answer: str, prediction: str) -> float:
    """Returns the F1 between two texts as bags of normalized words; 0 if they share no word."""
    left, right = normalized(answer).split(), normalized(prediction).split()
    shared = sum((collections.Counter(left) & collections.Counter(right)).values())
    return 2 * shared / (len(left) + len(right)) if shared else 0.0


@named("f1", "exact_match")
def answer_overlap(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[str]
) -> dict[str, float]:
    """Returns F1 and exact match against the best of each question's gold answers, as in SQuAD.

    Args:
        targets: {'answers': all gold answers, 'group': the question's name} of each row. Rows of
            the same group belong to one question and count once, with the prediction of the first
            row. Each row with group '' counts separately.
        predictions: The predicted text of each row.

    Raises:
        ValueError: a target has no gold answer.
    """
    seen: set[str] = set()
    scores = []
    for target, prediction in zip(targets, predictions, strict=True):
        if target["group"] in seen:
            continue
        seen |= {target["group"]} - {""}
        answers = target["answers"]
        if not answers:
            raise _unusable("", "empty")
        match = max(normalized(answer) == normalized(prediction) for answer in answers)
        scores.append((max(word_f1(answer, prediction) for answer in answers), match))
    f1_of_all, matches = 100 * np.mean(np.array(scores, np.float64), axis=0)
    return {"f1": float(f1_of_all), "exact_match": float(matches)}


def gold_answers(text: str, example: Mapping[str, Any], is_target: bool = False) -> Any:
    """SeqIO postprocessor: returns a target's gold answers and group, or a prediction's text."""
    if not is_target:
        return text
    answers = [answer.decode() for answer in np.asarray(example["answers"]).tolist()]
    return {"answers": answers, "group": example["group"].decode()}
