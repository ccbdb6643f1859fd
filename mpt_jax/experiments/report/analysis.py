"""The numbers of the report, from results alone."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from mpt_jax.experiments.report.run_reader import Curve
from mpt_jax.experiments.results import Estimate, Result, estimate, paired

BASELINE = "PT"  # what gains are over: prompt tuning that starts from nothing
ByLabel = Mapping[str, Mapping[int | None, Result]]  # label -> shots -> result


def short(task: str) -> str:
    """A task's name without its suite's prefix."""
    return task.removeprefix("toy_")


def family(method: str) -> str:
    """The method that a name varies: 'PT, P=40' and 'PT, T5-small' vary PT."""
    return re.split(", (?:P=|T5-)", method)[0]


def model_size(result: Result) -> float:
    """Numbers of the model; where all of it learns, those that learn."""
    return float(result.backbone_parameters or result.parameters)


def number(value: int | float) -> str:
    """A count in a few characters: 900, 76,800, 222 M, 3 B."""
    if value < 1e6:
        return f"{value:,.10g}"
    return f"{value / 1e6:.3g} M" if value < 1e9 else f"{value / 1e9:.3g} B"


def by_label(results: Sequence[Result]) -> dict[str, dict[int | None, Result]]:
    """Label -> shots -> result. A label is the method's name, and whatever else is needed to tell
    its results at one number of examples apart.

    Raises:
        ValueError: two results are told apart by nothing.
    """
    found: dict[str, dict[int | None, Result]] = {}
    for result in results:
        alike = [other for other in results if other.method == result.method]
        label = result.method
        if len({other.start for other in alike}) > 1 and result.start is not None:
            label += f" from {short(result.start)}"
        if len({other.prompt_length for other in alike}) > 1:
            label += f", P={result.prompt_length}"
        if len({model_size(other) for other in alike}) > 1:
            label += f", {number(model_size(result))}"
        if result.shots in found.setdefault(label, {}):
            raise ValueError(f"There are two results of {label!r} at {examples(result.shots)}.")
        found[label][result.shots] = result
    return found


def examples(shots: int | None) -> str:
    """A number of training examples, for people."""
    return "all examples" if shots is None else f"k = {shots}"


def shots_of(results: Iterable[Result]) -> list[int | None]:
    """The numbers of examples, ascending, all of them last."""
    return sorted({result.shots for result in results}, key=lambda k: math.inf if k is None else k)


def common_tasks(results: Sequence[Result]) -> tuple[str, ...]:
    """The tasks that all results have; means of methods are compared over these.

    Raises:
        ValueError: there is none.
    """
    tasks = tuple(t for t in results[0].scores if all(t in result.scores for result in results))
    if not tasks:
        raise ValueError("The results have no task in common, so their means say nothing.")
    return tasks


def gains(new: Result, old: Result) -> dict[str, Estimate]:
    """New minus old on each task that both have, over the seeds that both have."""
    tasks = [task for task in new.scores if task in old.scores]
    alone = {t: dataclasses.replace(new, scores={t: new.scores[t]}) for t in tasks}
    return {task: estimate(paired(alone[task], old)) for task in tasks}


def from_nothing(results: Sequence[Result], like: Result) -> Result | None:
    """The baseline that a result is measured against, if it was run: PT without a source, at the
    same number of examples on the same backbone, with the same prompt length where there are
    several."""
    found = [
        result
        for result in results
        if family(result.method) == BASELINE
        and result.start is None
        and result.shots == like.shots
        # A method that trains some of the model leaves a little less of it.
        and math.isclose(model_size(result), model_size(like), rel_tol=0.1)
    ]
    same = [result for result in found if result.prompt_length == like.prompt_length]
    return next(iter([*same, *(r for r in found if r.method == BASELINE)]), None)


def examples_needed(scores: Mapping[int, float], level: float) -> float | None:
    """The smallest number of examples at which a method reaches a level: linear between its
    numbers of examples in log k, and not below the smallest of them. None if it never does.

    Args:
        scores: number of examples -> mean score.
        level: the score to reach.
    """
    points = sorted(scores.items())
    if points[0][1] >= level:
        return float(points[0][0])
    for (k, score), (next_k, next_score) in zip(points, points[1:], strict=False):
        if next_score >= level:
            share = (level - score) / (next_score - score)
            return math.exp((1 - share) * math.log(k) + share * math.log(next_k))
    return None


def by_shots(results: Mapping[int | None, Result], tasks: Sequence[str]) -> dict[int, float]:
    """Number of examples -> mean score over tasks and seeds; all examples are no number."""
    return {
        k: float(np.mean(result.means(tasks))) for k, result in results.items() if k is not None
    }


def set_apart(
    values: Mapping[str, float], gap: float = 0.06, most: float = 0.15
) -> dict[str, float]:
    """Positive values for a logarithmic axis, with those that would hide each other spread around
    their middle.

    Args:
        values: of labels.
        gap: the distance of two that are moved, in decades.
        most: the distance of the outermost of many.
    """
    clusters: list[list[str]] = []
    for label in sorted(values, key=lambda label: values[label]):
        last = values[clusters[-1][-1]] if clusters else 0.0
        if last and math.log10(values[label] / last) < gap:
            clusters[-1].append(label)
        else:
            clusters.append([label])
    found = {}
    for labels in clusters:
        middle = np.mean([math.log10(values[label]) for label in labels])
        step = min(gap, most / max(len(labels) - 1, 1))
        for i, label in enumerate(labels):
            found[label] = float(10 ** (middle + step * (i - (len(labels) - 1) / 2)))
    return found


def varying(
    results: Sequence[Result],
    value: Callable[[Result], float],
    fixed: Callable[[Result], Hashable],
) -> dict[Hashable, list[Result]]:
    """Groups of results that agree in `fixed` and differ in `value`, ascending in it; groups of
    one value are left out."""
    groups = collections.defaultdict(list)
    for result in results:
        groups[fixed(result)].append(result)
    return {
        key: sorted(group, key=value)
        for key, group in groups.items()
        if len({value(result) for result in group}) > 1
    }


def mean_curves(curves: Iterable[Curve]) -> dict[int, Curve]:
    """Last step -> the mean of the curves that end there, at the steps that all of them have."""
    groups = collections.defaultdict(list)
    for curve in curves:
        if curve:
            groups[max(curve)].append(curve)
    return {
        last: {
            step: float(np.mean([curve[step] for curve in group]))
            for step in sorted(set.intersection(*(set(curve) for curve in group)))
        }
        for last, group in groups.items()
    }


def cosines(prompts: Float[np.ndarray, "K P H"]) -> Float[np.ndarray, "K K"]:
    """Cosine similarity of flattened prompts."""
    flat = prompts.reshape(len(prompts), -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return unit @ unit.T


def cosines_by_task(
    prompts: Float[np.ndarray, "K P H"], tasks: Sequence[str]
) -> tuple[list[str], Float[np.ndarray, "T T"]]:
    """Mean cosine similarity between the runs of two tasks; on the diagonal between different runs
    of one task, 1 where it has only one.

    Args:
        prompts: of each run.
        tasks: of each run.
    """
    similar, names = cosines(prompts), list(dict.fromkeys(tasks))
    found = np.ones((len(names), len(names)), similar.dtype)
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            pairs = [
                similar[a, b]
                for a, task in enumerate(tasks)
                for b, other in enumerate(tasks)
                if (task, other) == (first, second) and a != b
            ]
            if pairs:
                found[i, j] = np.mean(pairs)
    return names, found


def entropy(weights: Float[np.ndarray, "K J"]) -> Float[np.ndarray, " K"]:
    """Of each row's weights as shares of their sum, in nats: 0 where one has all, ln J where all
    have the same."""
    shares = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return -(shares * np.log(np.maximum(shares, 1e-30))).sum(-1)
