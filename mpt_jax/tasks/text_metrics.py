"""Metrics of decoded text, all in percent. Anything that is no valid answer counts as wrong.

Each function here makes, or is, a SeqIO metric `(targets, predictions) -> {name: value}`. A task's
first metric is the one by which its best step is selected. Accuracy, F1 and Matthews' correlation
are scikit-learn's, Pearson's and Spearman's SciPy's, the scores of answers ours.

A metric that is undefined, such as a correlation with a constant, is 0, and a warning says why.
Each that can be has a second value, `<metric>_undefined`, 1 then and otherwise 0, so that a table
can tell it from a 0 that was measured. A gold that no metric can be computed from is a ValueError.
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
from absl import logging
from scipy import stats
from sklearn import metrics as sklearn_metrics

Metric = Callable[[Sequence[Any], Sequence[str]], dict[str, float]]

_TASK: contextvars.ContextVar[str] = contextvars.ContextVar("task", default="")


def of_task(name: str, metric: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `metric`, whose warnings and errors name the task. Around another such, it wins."""

    @functools.wraps(metric)
    def named(*args: Any, **kwargs: Any) -> Any:
        token = _TASK.set(_TASK.get() or name)
        try:
            return metric(*args, **kwargs)
        finally:
            _TASK.reset(token)

    return named


def _marked(scores: Mapping[str, float], why: str | None, what: str = "") -> dict[str, float]:
    """Returns `scores`, then whether they are undefined. A warning says `why`, unless it is None.

    Args:
        scores: name -> percent, the first one first.
        why: why none of them is defined.
        what: what the warning calls them; by default the name of the first.
    """
    if why is not None:
        of = f" of {_TASK.get()}" if _TASK.get() else ""
        logging.warning("%s%s is undefined: %s; counted as 0.", what or next(iter(scores)), of, why)
    return {**scores, **{f"{name}_undefined": float(why is not None) for name in scores}}


def _unusable(target: Any, what: str) -> ValueError:
    of = f"Task {_TASK.get()!r}: the" if _TASK.get() else "The"
    return ValueError(f"{of} gold {target!r} is {what}, so predictions cannot be scored by it.")


def _constant(
    targets: np.ndarray, said: np.ndarray, shown: Callable[[Any], str] = str
) -> str | None:
    """Returns which of two lists of values has one value alone, and that as `shown`, or None."""
    for what, values in (("target", targets), ("prediction", said)):
        if np.ptp(values) == 0:
            return f"every {what} is {shown(values[0])}"
    return None


# --- Labels ----------------------------------------------------------------------------------


def label_numbers(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns both as label numbers; -1 for a prediction that is no label.

    Raises:
        ValueError: a target is no label.
    """
    number = {label: i for i, label in enumerate(labels)}
    for target in targets:
        if target not in number:
            raise _unusable(target, f"none of the labels {', '.join(map(repr, labels))}")
    said = np.array([number.get(prediction.strip(), -1) for prediction in predictions])
    return np.array([number[target] for target in targets]), said


def _two_sided(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """As `label_numbers` for two labels, where what is no label becomes the wrong one: T5's F1."""
    true, said = label_numbers(targets, predictions, labels)
    return true, np.where(said < 0, 1 - true, said)


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Percent of predictions that are their target, apart from white space around them."""
    number = {target: i for i, target in enumerate(dict.fromkeys(targets))}
    said = [number.get(prediction.strip(), -1) for prediction in predictions]
    true = [number[target] for target in targets]
    return {"accuracy": 100 * float(sklearn_metrics.accuracy_score(true, said))}


def invalid_rate(labels: Sequence[str]) -> Metric:
    """Percent of predictions that are none of the labels."""

    def invalid(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        _, said = label_numbers(targets, predictions, labels)
        return {"invalid": 100 * float(np.mean(said < 0))}

    return invalid


def f1(labels: Sequence[str]) -> Metric:
    """F1 of the second of two labels (duplicate, equivalent, True).

    What is no label counts as the wrong one, as in T5.
    """

    def label_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        return f1_of_labels(*_two_sided(targets, predictions, labels), labels, [1])

    return label_f1


def macro_f1(labels: Sequence[str]) -> Metric:
    """Mean over the labels of their F1. What is no label is a prediction of none of them."""

    def mean_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        numbers = label_numbers(targets, predictions, labels)
        return f1_of_labels(*numbers, labels, range(len(labels)))

    return mean_f1


def f1_of_labels(
    true: np.ndarray, said: np.ndarray, labels: Sequence[str], scored: Sequence[int]
) -> dict[str, float]:
    """Mean F1 of some labels, where one that neither occurs nor is said has 0 and marks the mean.

    Args:
        true, said: label numbers [n]; -1 for what is no label.
        labels: what the numbers mean.
        scored: the labels that the mean is of, as numbers.
    """
    absent = sorted(set(scored) - set(true.tolist()) - set(said.tolist()))
    names = " or ".join(repr(labels[number]) for number in absent)
    mean = sklearn_metrics.f1_score(
        true, said, labels=list(scored), average="macro", zero_division=0
    )
    why = f"no target and no prediction is {names}" if absent else None
    return _marked({"f1": 100 * float(mean)}, why)


def matthews(labels: Sequence[str]) -> Metric:
    """Matthews' correlation, where what is no label counts as one label more, as in T5.

    0 where all predictions, or all targets, are the same.
    """

    def shown(number: int) -> str:
        return repr(labels[number]) if number >= 0 else "no label"

    def matthews_correlation(
        targets: Sequence[str], predictions: Sequence[str]
    ) -> dict[str, float]:
        true, said = label_numbers(targets, predictions, labels)
        why = _constant(true, said, shown)
        value = 0.0 if why else float(sklearn_metrics.matthews_corrcoef(true, said))
        return _marked({"matthews": 100 * value}, why)

    return matthews_correlation


# --- Numbers ---------------------------------------------------------------------------------

_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


def correlations(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Pearson's and Spearman's correlation of numbers, and how many predictions are none.

    What is no number counts as 0. A correlation with a constant is 0.

    Raises:
        ValueError: a target is no number.
    """
    known = [_NUMBER.fullmatch(prediction.strip()) for prediction in predictions]
    said = np.array([float(match.group()) if match else 0.0 for match in known])
    true = np.array([_gold_number(target) for target in targets])
    why = _constant(true, said)
    found = {
        "pearson": 0.0 if why else 100 * float(stats.pearsonr(true, said).statistic),
        "spearman": 0.0 if why else 100 * float(stats.spearmanr(true, said).statistic),
    }
    invalid = 100 * float(np.mean([match is None for match in known]))
    return {**_marked(found, why, "correlation"), "invalid": invalid}


def _gold_number(target: str) -> float:
    if _NUMBER.fullmatch(target) is None:
        raise _unusable(target, "no number")
    return float(target)


# --- Answers ---------------------------------------------------------------------------------


def normalized(answer: str) -> str:
    """The official SQuAD script's form: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def word_f1(answer: str, prediction: str) -> float:
    """F1 between the bags of words of two normalized texts; 0 where they share none."""
    left, right = normalized(answer).split(), normalized(prediction).split()
    shared = sum((collections.Counter(left) & collections.Counter(right)).values())
    return 2 * shared / (len(left) + len(right)) if shared else 0.0


def answer_overlap(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[str]
) -> dict[str, float]:
    """F1 and exact match against the best of each question's gold answers, as SQuAD has them.

    Args:
        targets: {'answers': all gold answers, 'group': name of the question}. Rows with the same
            group, made of one question, count once, with the first row's prediction; '' is a
            group of its own.
        predictions: one for each target.

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
    """SeqIO postprocessor: of a target all gold answers and the group, of a prediction its text."""
    if not is_target:
        return text
    answers = [answer.decode() for answer in np.asarray(example["answers"]).tolist()]
    return {"answers": answers, "group": example["group"].decode()}
