"""Statistics of the report."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from mpt_jax.artifacts.artifacts import Artifact
from mpt_jax.experiments.report.run_reader import Curve
from mpt_jax.experiments.results import Estimate, Result, estimate, paired
from mpt_jax.prompts.base import params_of_parts
from mpt_jax.prompts.materialize import plain_prompts

BASELINE = "PT"  # gains are relative to prompt tuning without a source prompt
ByLabel = Mapping[str, Mapping[int | None, Result]]  # label -> shots -> result


def short(task: str) -> str:
    """Returns a task's name without its suite's prefix."""
    return task.removeprefix("toy_")


def family(method: str) -> str:
    """Returns the base method of a method's name: 'PT' for 'PT, P=40' and 'PT, T5-small'."""
    return re.split(", (?:P=|T5-)", method)[0]


def model_size(result: Result) -> float:
    """Returns the number of frozen parameters or, if none are frozen, of trainable parameters."""
    return float(result.backbone_parameters or result.parameters)


def number(value: int | float) -> str:
    """Formats a count compactly, for example `76,800` or `222 M`."""
    if value < 1e6:
        return f"{value:,.10g}"
    return f"{value / 1e6:.3g} M" if value < 1e9 else f"{value / 1e9:.3g} B"


def by_label(results: Sequence[Result]) -> dict[str, dict[int | None, Result]]:
    """Returns label -> shots -> result. A label is the method's name, plus the source task, prompt
    length and model size if these differ between results of the method.

    Raises:
        ValueError: two results have the same label and number of examples.
    """
    labeled: dict[str, dict[int | None, Result]] = {}
    for result in results:
        same_method = [other for other in results if other.method == result.method]
        label = result.method
        if len({other.start for other in same_method}) > 1 and result.start is not None:
            label += f" from {short(result.start)}"
        if len({other.prompt_length for other in same_method}) > 1:
            label += f", P={result.prompt_length}"
        if len({model_size(other) for other in same_method}) > 1:
            label += f", {number(model_size(result))}"
        if result.shots in labeled.setdefault(label, {}):
            raise ValueError(
                f"results.json has two results of {label!r} for {examples(result.shots)} that the "
                "report cannot tell apart. Remove one of them, or rename its method."
            )
        labeled[label][result.shots] = result
    return labeled


def examples(shots: int | None) -> str:
    """Returns a number of training examples as text."""
    return "all examples" if shots is None else f"k = {shots}"


def shots_of(results: Iterable[Result]) -> list[int | None]:
    """Returns the different numbers of examples in ascending order; None (all examples) is last."""
    return sorted({result.shots for result in results}, key=lambda k: math.inf if k is None else k)


def common_tasks(results: Sequence[Result]) -> tuple[str, ...]:
    """Returns the tasks that all results have, over which means of methods are compared.

    Raises:
        ValueError: the results have no task in common.
    """
    tasks = tuple(t for t in results[0].scores if all(t in result.scores for result in results))
    if not tasks:
        raise ValueError(
            "The results have no task in common, so their means cannot be compared. Run the "
            "methods on the same tasks."
        )
    return tasks


def gains(new: Result, old: Result) -> dict[str, Estimate]:
    """Returns the estimate of new minus old for each common task, over the common seeds.

    Raises:
        ValueError: the results have no seed in common.
    """
    tasks = [task for task in new.scores if task in old.scores]
    return {task: estimate(paired(new, old, [task])) for task in tasks}


def from_nothing(results: Sequence[Result], like: Result) -> Result | None:
    """Returns the baseline of a result: PT without a source prompt, on a backbone of the same size,
    with the same number of examples and preferably the same prompt length. None if it was not
    run."""
    baselines = [
        result
        for result in results
        if family(result.method) == BASELINE
        and result.start is None
        and result.shots == like.shots
        # A method that trains part of the model has slightly fewer frozen parameters.
        and math.isclose(model_size(result), model_size(like), rel_tol=0.1)
    ]
    same_length = [result for result in baselines if result.prompt_length == like.prompt_length]
    return next(iter([*same_length, *(r for r in baselines if r.method == BASELINE)]), None)


def examples_needed(scores: Mapping[int, float], level: float) -> float | None:
    """Returns the smallest number of examples with which a method reaches a score; None if it never
    does. Scores are interpolated linearly in log k, but not extrapolated below the smallest k.

    Args:
        scores: Number of examples -> mean score.
        level: The score to reach.
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
    """Returns number of examples -> mean score over tasks and seeds. 'All examples' is omitted."""
    return {
        k: float(np.mean(result.means(tasks))) for k, result in results.items() if k is not None
    }


def set_apart(
    values: Mapping[str, float], gap: float = 0.06, most: float = 0.15
) -> dict[str, float]:
    """Returns label -> value, with close values moved apart so that no point of a figure hides
    another. Values in a cluster are spread evenly around its center on a logarithmic axis.

    Args:
        values: Label -> positive value.
        gap: The distance between adjacent values of a cluster, in decades.
        most: The maximum distance between the outermost values of a cluster, in decades.
    """
    clusters: list[list[str]] = []
    for label in sorted(values, key=lambda label: values[label]):
        last = values[clusters[-1][-1]] if clusters else 0.0
        if last and math.log10(values[label] / last) < gap:
            clusters[-1].append(label)
        else:
            clusters.append([label])
    spread = {}
    for labels in clusters:
        middle = np.mean([math.log10(values[label]) for label in labels])
        step = min(gap, most / max(len(labels) - 1, 1))
        for i, label in enumerate(labels):
            spread[label] = float(10 ** (middle + step * (i - (len(labels) - 1) / 2)))
    return spread


def varying(
    results: Sequence[Result],
    value: Callable[[Result], float],
    fixed: Callable[[Result], Hashable],
) -> dict[Hashable, list[Result]]:
    """Groups results by `fixed` and sorts each group by `value`. Groups in which all values are
    equal are omitted."""
    groups = collections.defaultdict(list)
    for result in results:
        groups[fixed(result)].append(result)
    return {
        key: sorted(group, key=value)
        for key, group in groups.items()
        if len({value(result) for result in group}) > 1
    }


def mean_curves(curves: Iterable[Curve]) -> dict[int, Curve]:
    """Returns last step -> mean of the curves that end at this step, at the steps they all have."""
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


def cosines(prompts: Float[np.ndarray, "K ..."]) -> Float[np.ndarray, "K K"]:
    """Returns the cosine similarities of the flattened prompts."""
    flat = prompts.reshape(len(prompts), -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return unit @ unit.T


def cosines_by_task(
    prompts: Float[np.ndarray, "K ..."], tasks: Sequence[str]
) -> tuple[list[str], Float[np.ndarray, "T T"]]:
    """Returns the tasks, and the mean cosine similarity between the runs of every pair of tasks.
    The diagonal compares different runs of one task; it is 1 for a task with a single run.

    Args:
        prompts: The prompt of each run.
        tasks: The task of each run.
    """
    similar, names = cosines(prompts), list(dict.fromkeys(tasks))
    means = np.ones((len(names), len(names)), similar.dtype)
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            pairs = [
                similar[a, b]
                for a, task in enumerate(tasks)
                for b, other in enumerate(tasks)
                if (task, other) == (first, second) and a != b
            ]
            if pairs:
                means[i, j] = np.mean(pairs)
    return names, means


def entropy(weights: Float[np.ndarray, "K J"]) -> Float[np.ndarray, " K"]:
    """Returns the entropy of each run's normalized weights in nats: 0 if one candidate has all the
    weight, ln J if all J candidates have the same weight."""
    shares = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return -(shares * np.log(np.maximum(shares, 1e-30))).sum(-1)


def flat_prompts(artifacts: Iterable[Artifact]) -> Float[np.ndarray, "K D"]:
    """Returns the prompts of all runs, flattened and, if there are several sites, one after the
    other.

    Raises:
        ValueError: prompts depend on the input, or have different lengths.
    """
    prompts = []
    for artifact in artifacts:
        if artifact.method.reads_input:
            what = "text" if artifact.method.reads_text else "image"
            raise ValueError(
                f"prompts of {artifact.method.name!r} depend on the {what}, so they cannot be "
                "compared."
            )
        parts = params_of_parts(artifact.method, artifact.params, artifact.runs).values()
        plain = [plain_prompts(method, params, artifact.runs) for method, params in parts]
        if not plain:
            raise ValueError(f"the method {artifact.method.name!r} has no prompts.")
        prompts += zip(*plain, strict=True)
    lengths = sorted({sum(map(len, sites)) for sites in prompts})
    if len(lengths) > 1:
        raise ValueError(
            f"prompts have {', '.join(map(str, lengths))} positions; only prompts of the same "
            "length can be compared."
        )
    return np.stack([np.concatenate([np.ravel(x) for x in sites]) for sites in prompts])
