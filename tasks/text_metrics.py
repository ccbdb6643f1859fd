"""Metrics of decoded text, all in percent. Anything that is no valid answer counts as wrong.

Each function here makes, or is, a SeqIO metric `(targets, predictions) -> {name: value}`. A task's
first metric is the one by which its best step is selected.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Metric = Callable[[Sequence[Any], Sequence[str]], dict[str, float]]


# --- Labels ----------------------------------------------------------------------------------


def _numbers(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns both as label numbers; -1 for a prediction that is no label."""
    number = {label: i for i, label in enumerate(labels)}
    said = np.array([number.get(prediction.strip(), -1) for prediction in predictions])
    return np.array([number[target] for target in targets]), said


def _two_sided(
    targets: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """As `_numbers` for two labels, where what is no label becomes the wrong one, as in T5."""
    true, said = _numbers(targets, predictions, labels)
    return true, np.where(said < 0, 1 - true, said)


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Percent of predictions that are their target, apart from white space around them."""
    hits = [t == p.strip() for t, p in zip(targets, predictions, strict=True)]
    return {"accuracy": 100 * float(np.mean(hits))}


def invalid_rate(labels: Sequence[str]) -> Metric:
    """Percent of predictions that are none of the labels."""

    def invalid(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        _, said = _numbers(targets, predictions, labels)
        return {"invalid": 100 * float(np.mean(said < 0))}

    return invalid


def f1(labels: Sequence[str]) -> Metric:
    """F1 of the second of two labels (duplicate, equivalent, True)."""

    def label_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        return {"f1": 100 * _f1(*_two_sided(targets, predictions, labels), 1)}

    return label_f1


def macro_f1(labels: Sequence[str]) -> Metric:
    """Mean over the labels of their F1."""

    def mean_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        numbers = _numbers(targets, predictions, labels)
        return {"f1": 100 * float(np.mean([_f1(*numbers, i) for i in range(len(labels))]))}

    return mean_f1


def _f1(true: np.ndarray, said: np.ndarray, label: int) -> float:
    """F1 of one label; 0 where it neither occurs nor is said."""
    named = (true == label).sum() + (said == label).sum()
    return 2 * float(((true == label) & (said == label)).sum()) / max(1, int(named))


def matthews(labels: Sequence[str]) -> Metric:
    """Matthews' correlation of two labels; 0 where only one is said, or only one occurs."""

    def matthews_correlation(
        targets: Sequence[str], predictions: Sequence[str]
    ) -> dict[str, float]:
        return {"matthews": 100 * _correlation(*_two_sided(targets, predictions, labels))}

    return matthews_correlation


# --- Numbers ---------------------------------------------------------------------------------

_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


def correlations(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Pearson's and Spearman's correlation of numbers, and how many predictions are none.

    What is no number counts as 0. A correlation with a constant is 0.
    """
    known = [_NUMBER.fullmatch(prediction.strip()) for prediction in predictions]
    said = np.array([float(match.group()) if match else 0.0 for match in known])
    true = np.array([float(target) for target in targets])
    ranks = [stats.rankdata(values) for values in (true, said)]
    return {
        "pearson": 100 * _correlation(true, said),
        "spearman": 100 * _correlation(*ranks),
        "invalid": 100 * float(np.mean([match is None for match in known])),
    }


def _correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's; of two yes-or-no variables it is Matthews'."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(stats.pearsonr(left, right).statistic)


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
    """
    seen: set[str] = set()
    scores = []
    for target, prediction in zip(targets, predictions, strict=True):
        if target["group"] in seen:
            continue
        seen |= {target["group"]} - {""}
        answers = target["answers"]
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
