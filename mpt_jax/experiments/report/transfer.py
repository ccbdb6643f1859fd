"""Statistics of transfer: gains by source and target, groups of targets, and prompt similarity."""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial import distance

from mpt_jax.experiments.report import analysis
from mpt_jax.experiments.results import Result

DRAWS = 9_999  # permutations, if there are more
SIMILAR = 0.5  # mean cosine between groups above which they are merged


class Transfer(NamedTuple):
    """Gains of one method by source and target.

    Attributes:
        method: The method without its source, such as "PT".
        shots: The number of training examples; None for all.
        by_source: Source -> result.
        targets: The target tasks.
        gains: [S, T] the mean gain in points, NaN for tasks without a result. A target that is also
            a source has a gain from itself.
        old: The result without a source that gains are relative to. None: they are relative to the
            mean over the other tasks that are sources.
    """

    method: str
    shots: int | None
    by_source: Mapping[str, Result]
    targets: Sequence[str]
    gains: Float[np.ndarray, "S T"]
    old: Result | None

    @property
    def sources(self) -> list[str]:
        """The names of the sources."""
        return list(self.by_source)

    @property
    def gains_from_others(self) -> Float[np.ndarray, "S T"]:
        """The gains, NaN where a task is its own source."""
        return from_others(self.gains, self.sources, self.targets)


def without_source(method: str) -> str:
    """Returns a method's name without its source: "PT, P=40" of "PT from MNLI, P=40"."""
    return re.sub(r" from [^,]*", "", method)


def of_results(results: Sequence[Result]) -> list[Transfer]:
    """Returns the gains of each method that has results from at least two sources, for each number
    of examples, size of the model and prompt length."""
    groups = collections.defaultdict(list)
    for result in results:
        if result.start is not None:
            method = without_source(result.method)
            size = analysis.model_size(result), result.prompt_length
            groups[method, result.shots, size].append(result)
    found = []
    for (method, shots, _), group in groups.items():
        by_source = {result.start: result for result in group}
        if len(by_source) > 1:
            found.append(_transfer(method, shots, by_source, baseline(results, group[0])))
    return found


def baseline(results: Sequence[Result], like: Result) -> Result | None:
    """Returns the result of the same method without a source, on a backbone of the same size with
    as many examples; or else that of PT (`analysis.from_nothing`); None without either."""
    method, size = without_source(like.method), analysis.model_size(like)
    for result in results:
        same = (result.method, result.start, result.shots) == (method, None, like.shots)
        if same and math.isclose(analysis.model_size(result), size, rel_tol=0.1):
            return result
    return analysis.from_nothing(results, like)


def _transfer(
    method: str, shots: int | None, by_source: Mapping[str, Result], old: Result | None
) -> Transfer:
    targets = list(dict.fromkeys(task for result in by_source.values() for task in result.scores))
    if old is not None and not all(set(old.seeds) & set(x.seeds) for x in by_source.values()):
        old = None
    gains = np.full((len(by_source), len(targets)), np.nan)
    for row, result in enumerate(by_source.values()):
        if old is not None:
            found = {task: gain.mean for task, gain in analysis.gains(result, old).items()}
        else:
            found = {task: float(np.mean(result.values(task))) for task in result.scores}
        for task, gain in found.items():
            gains[row, targets.index(task)] = gain
    if old is None:
        gains = gains - known_mean(from_others(gains, list(by_source), targets), 0)
    return Transfer(method, shots, by_source, targets, gains, old)


def from_others(
    values: Float[np.ndarray, "S T"], sources: Sequence[str], targets: Sequence[str]
) -> Float[np.ndarray, "S T"]:
    """Returns values by source and target, NaN where both are the same task."""
    same = np.array([[source == target for target in targets] for source in sources])
    return np.where(same, np.nan, values)


def known_mean(values: Float[np.ndarray, "_ _"], axis: int) -> Float[np.ndarray, " _"]:
    """Returns the mean of the values that are not NaN; NaN if all are."""
    count = np.isfinite(values).sum(axis)
    return np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)


def ranking(gains: Float[np.ndarray, "S"]) -> list[int]:
    """Returns the sources with a gain, the best one first."""
    known = [source for source in range(len(gains)) if not np.isnan(gains[source])]
    return sorted(known, key=lambda source: (-gains[source], source))


def row_cosines(rows: Float[np.ndarray, "T S"]) -> Float[np.ndarray, "T T"]:
    """Returns the cosine similarities of rows over the entries that both have. That of a row of
    zeros is 0, except with itself."""
    found = np.eye(len(rows))
    for i, j in itertools.combinations(range(len(rows)), 2):
        both = np.isfinite(rows[i]) & np.isfinite(rows[j])
        one, other = rows[i, both], rows[j, both]
        norm = float(np.linalg.norm(one) * np.linalg.norm(other))
        found[i, j] = found[j, i] = one @ other / norm if norm > 0 else 0.0
    return found


def grouped(similar: Float[np.ndarray, "T T"]) -> list[list[int]]:
    """Returns groups of rows by average linkage: groups are merged while the mean cosine between
    the rows of two groups exceeds `SIMILAR`. The largest group is first."""
    if len(similar) < 2:
        return [[i] for i in range(len(similar))]
    apart = np.maximum(1 - (similar + similar.T) / 2, 0)
    np.fill_diagonal(apart, 0)
    tree = hierarchy.linkage(distance.squareform(apart, checks=False), "average")
    numbers = hierarchy.fcluster(tree, 1 - SIMILAR, "distance").tolist()
    groups = collections.defaultdict(list)
    for row, number in enumerate(numbers):
        groups[number].append(row)
    return sorted(groups.values(), key=lambda group: (-len(group), group))


class Agreement(NamedTuple):
    """Spearman's rank correlation of gains with similarities, over n pairs of source and target,
    and its two-sided p-value by permutation. NaN if either does not vary."""

    rho: float
    n: int
    p: float


def agreement(
    gains: Float[np.ndarray, "S T"], similar: Float[np.ndarray, "S T"], square: bool
) -> Agreement:
    """Returns the correlation of gains with similarities.

    Pairs with the same source or target are not independent, so the p-value permutes the sources of
    the similarities: all permutations if there are few, otherwise `DRAWS` random ones.

    Args:
        gains: The gains; NaN for pairs to leave out.
        similar: The similarities; NaN for pairs to leave out.
        square: Whether rows and columns are the same tasks in the same order, which are then
            permuted together (Mantel's test).
    """
    rho, n = _spearman(gains, similar)
    if math.isnan(rho):
        return Agreement(rho, n, rho)
    count = len(gains)
    few = math.factorial(min(count, 10)) <= DRAWS
    rng = np.random.default_rng(0)
    if few:
        orders = [list(order) for order in itertools.permutations(range(count))]
    else:
        orders = [list(range(count)), *(rng.permutation(count).tolist() for _ in range(DRAWS))]
    as_far = 0
    for order in orders:
        moved = similar[order]
        moved = moved[:, order] if square else moved
        # Sums of ranks differ by rounding.
        as_far += not abs(_spearman(gains, moved)[0]) < abs(rho) - 1e-9
    return Agreement(rho, n, as_far / len(orders))


def _spearman(one: np.ndarray, other: np.ndarray) -> tuple[float, int]:
    both = np.isfinite(one) & np.isfinite(other)
    ranks = np.stack([stats.rankdata(one[both]), stats.rankdata(other[both])])
    n = int(both.sum())
    if n < 3 or np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0:
        return math.nan, n
    return float(np.corrcoef(ranks)[0, 1]), n


def similarities(
    sources: Mapping[str, Float[np.ndarray, "n D"]],
    targets: Mapping[str, Float[np.ndarray, "m D"]],
) -> Float[np.ndarray, "S T"]:
    """Returns the mean cosine between the prompts of each source and of each target; NaN for the
    same task.

    Args:
        sources: Source -> its prompts, flattened.
        targets: Target -> its prompts, flattened.
    """
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)  # noqa: E731
    found = np.full((len(sources), len(targets)), np.nan)
    for i, (source, own) in enumerate(sources.items()):
        for j, (target, theirs) in enumerate(targets.items()):
            if source != target:
                found[i, j] = float(np.mean(unit(own) @ unit(theirs).T))
    return found
