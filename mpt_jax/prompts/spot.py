"""SPoT's choice of source prompts by similarity (Vu et al. 2022, arXiv 2110.07904).

The embedding of a task is its prompt early in prompt tuning. A target starts from the prompt of the
source whose embedding is nearest to its own, or from a weighted mean of the nearest few:

    mean_pooled   sim(s, t) = cos( mean_p e_s[p], mean_p e_t[p] )
    row_pairs     sim(s, t) = mean_pq cos( e_s[p], e_t[q] )

    P_t = sum_s w_s P_s / sum_s w_s     w_s = max(sim(s, t), 0) for the top k sources, else 0

What is trained afterwards is prompt tuning, or any method that starts from a table of weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from absl import logging

from mpt_jax.core.runs import Runs, unknown_name

# Run -> {source run: weight}.
SourceTable = Mapping[str, Mapping[str, int | float] | str]
SIMILARITIES = ("mean_pooled", "row_pairs")
# Weights are kept to six decimals, so that a run that is resumed on another machine finds the same.
DECIMALS = 6


class Embeddings(NamedTuple):
    """Task embeddings, as an artifact holds them.

    Attributes:
        path: of the artifact, for messages.
        runs: its rows.
        prompts: [K, P, H], its folded prompts.
    """

    path: str
    runs: Runs
    prompts: np.ndarray

    def of(self, runs: Runs) -> np.ndarray:
        """The embedding [K, P, H] of each run: the one of its name, else the only one of its task.

        Raises:
            ValueError: a run has none, or its task has several.
        """
        names = zip(runs.run_names, runs.task_names, strict=True)
        return np.stack([self.prompts[self._row(run, task)] for run, task in names])

    def _row(self, run: str, task: str) -> int:
        if run in self.runs.run_names:
            return self.runs.row(run)
        rows = [row for row, known in enumerate(self.runs.task_names) if known == task]
        if len(rows) == 1:
            return rows[0]
        names = self.runs.run_names
        if rows:
            found = ", ".join(names[row] for row in rows)
            raise ValueError(
                f"{self.path} has several embeddings of the task {task!r} ({found}) and none of "
                f"the run {run!r}: give the run the name of one."
            )
        raise ValueError(
            f"{self.path} has no embedding of {run!r}; it has {', '.join(names)}. Embeddings are "
            "early prompts: gin/spot_embeddings.gin makes those of targets, "
            "gin/spot_source_embeddings.gin those of sources."
        )


@dataclasses.dataclass(frozen=True)
class NearestSource:
    """A `start_from` that chooses for each run among the prompts of the initial artifact.

    It names artifacts and reads none: `train_state.fill` does, which can tell another backbone's.

    Attributes:
        source_embeddings: artifact with an early prompt of every source.
        target_embeddings: artifact with an early prompt of every run (or of its task).
        top_k: how many sources to mix.
        similarity: `'mean_pooled'` or `'row_pairs'`.
    """

    source_embeddings: str
    target_embeddings: str
    top_k: int = 1
    similarity: str = "mean_pooled"

    def __post_init__(self):
        if self.similarity not in SIMILARITIES:
            raise ValueError(unknown_name("similarity", self.similarity, SIMILARITIES))
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")

    def choose(
        self, sources: Embeddings, targets: Embeddings, source_runs: Runs, runs: Runs
    ) -> SourceTable:
        """The weight of each chosen source, for every run; also in the log.

        Weights add to one. One source alone is taken whatever its similarity.

        Args:
            sources: read from `source_embeddings`.
            targets: read from `target_embeddings`.
            source_runs: the rows of the initial artifact.
            runs: the rows that start.

        Raises:
            ValueError: top_k exceeds the sources; a source or run without an embedding; several
                sources are to be mixed and none is similar at all.
        """
        if self.top_k > source_runs.num_rows:
            raise ValueError(
                f"top_k is {self.top_k}, and the initial artifact holds {source_runs.num_rows} "
                f"sources: {', '.join(source_runs.run_names)}."
            )
        found = cosines(targets.of(runs), sources.of(source_runs), self.similarity)
        table = {}
        for run, similarities in zip(runs.run_names, found, strict=True):
            by_source = zip(source_runs.run_names, similarities.tolist(), strict=True)
            table[run] = self._weights(run, dict(by_source))
        return table

    def _weights(self, run: str, similarities: dict[str, float]) -> dict[str, float]:
        nearest = sorted(similarities, key=lambda source: -similarities[source])[: self.top_k]
        weights = {source: max(similarities[source], 0.0) for source in nearest}
        if self.top_k == 1:
            weights = {nearest[0]: 1.0}
        total = sum(weights.values())
        if not total > 0:
            raise ValueError(
                f"No source is similar to {run!r}: {similarities}. Start from one by its name, or "
                "by top_k = 1 from the least dissimilar, or from initial values "
                "(gin/pt_target.gin)."
            )
        weights = {source: round(weight / total, DECIMALS) for source, weight in weights.items()}
        weights = {source: weight for source, weight in weights.items() if weight > 0}
        rounded = {source: round(found, 3) for source, found in similarities.items()}
        logging.info("%s starts from %s; similarities: %s.", run, weights, rounded)
        return weights


def cosines(targets: np.ndarray, sources: np.ndarray, similarity: str) -> np.ndarray:
    """Similarities [K, S] of embeddings [K, P, H] and [S, P, H], in float64.

    Raises:
        ValueError: an embedding, or a row of one, is zero and so has no direction.
    """
    pooled = [_pool(np.asarray(x, np.float64), similarity) for x in (targets, sources)]
    return pooled[0] @ pooled[1].T


def _pool(prompts: np.ndarray, similarity: str) -> np.ndarray:
    """[K, H] whose dot products are the similarities: the mean over all pairs of rows is the dot
    product of the means of unit rows."""
    if similarity == "row_pairs":
        return _unit(prompts).mean(1)
    return _unit(prompts.mean(1))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (lengths > 0).all():
        raise ValueError("A task embedding is zero or not a number, so nothing is near to it.")
    return vectors / lengths
