"""Choice of source prompts by similarity, as in SPoT (Vu et al. 2022, arXiv 2110.07904).

The embedding of a task is its prompt early in prompt tuning. A target starts from the prompt of
the source with the most similar embedding, or from a weighted mean of the k most similar:

    mean_pooled   sim(s, t) = cos( mean_p e_s[p], mean_p e_t[p] )
    row_pairs     sim(s, t) = mean_pq cos( e_s[p], e_t[q] )

    P_t = sum_s w_s P_s / sum_s w_s     w_s = max(sim(s, t), 0) for the top k sources, else 0

Training then continues with prompt tuning or any other method that accepts a table of weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from mpt_jax.core.runs import Runs, unknown_name

# Run -> {source run: weight}.
SourceTable = Mapping[str, Mapping[str, int | float] | str]
SIMILARITIES = ("mean_pooled", "row_pairs")
# Weights are rounded to six decimals, so that a run resumed on another machine gets the same ones.
DECIMALS = 6


class Embeddings(NamedTuple):
    """Task embeddings read from an artifact.

    Attributes:
        path: the artifact's path, shown in errors.
        runs: the artifact's runs.
        prompts: [K, P, H], the artifact's plain prompts.
    """

    path: str
    runs: Runs
    prompts: np.ndarray

    def of(self, runs: Runs) -> np.ndarray:
        """Returns the embedding [K, P, H] of each run.

        A run without an embedding of its name gets the only embedding of its task.

        Raises:
            ValueError: a run has no embedding, or only several of its task.
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
            candidates = ", ".join(names[row] for row in rows)
            raise ValueError(
                f"{self.path} has several embeddings of the task {task!r} ({candidates}), but none "
                f"is named {run!r}. Rename the run to one of these names, or train an embedding of "
                f"{run!r} with gin/spot_embeddings.gin (for a source, "
                "gin/spot_source_embeddings.gin)."
            )
        raise ValueError(
            f"{self.path} has no task embedding of {run!r}, only of {', '.join(names)}. Train the "
            "missing embedding with gin/spot_embeddings.gin for a target, or with "
            "gin/spot_source_embeddings.gin for a source."
        )


@dataclasses.dataclass(frozen=True)
class NearestSource:
    """A `start_from` setting that chooses, for each run, the most similar source prompts.

    It holds only the paths of the artifacts that contain the embeddings. `training.initialization`
    reads the artifacts and checks that they have the job's backbone.

    Attributes:
        source_embeddings: the artifact with an embedding of every source.
        target_embeddings: the artifact with an embedding of every run, or of the run's task.
        top_k: the number of most similar sources that each prompt is mixed from.
        similarity: `'mean_pooled'` or `'row_pairs'`; see the module docstring.
    """

    source_embeddings: str
    target_embeddings: str
    top_k: int = 1
    similarity: str = "mean_pooled"

    def __post_init__(self):
        if self.similarity not in SIMILARITIES:
            raise ValueError(unknown_name("similarity", self.similarity, SIMILARITIES))
        if self.top_k < 1:
            raise ValueError(
                f"NearestSource.top_k must be at least 1, got {self.top_k}. Raise SPOT_TOP_K."
            )

    def choose(
        self, sources: Embeddings, targets: Embeddings, source_runs: Runs, runs: Runs
    ) -> SourceTable:
        """Returns the weights of the chosen sources for every run, and logs them.

        Weights sum to one before rounding. With top_k = 1 the most similar source is chosen, even
        if its similarity is negative.

        Args:
            sources: embeddings read from `source_embeddings`.
            targets: embeddings read from `target_embeddings`.
            source_runs: the runs of the initial artifact.
            runs: the runs to choose sources for.

        Raises:
            ValueError: top_k exceeds the number of sources; an embedding is missing, zero or not
                finite; or top_k > 1 and no source has a positive similarity to a run.
        """
        if self.top_k > source_runs.num_rows:
            raise ValueError(
                f"NearestSource.top_k is {self.top_k}, but the initial artifact holds "
                f"{source_runs.num_rows} sources: {', '.join(source_runs.run_names)}. Lower "
                "SPOT_TOP_K."
            )
        names = runs.run_names, source_runs.run_names
        similarities = cosines(targets.of(runs), sources.of(source_runs), self.similarity, names)
        table = {}
        for run, values in zip(runs.run_names, similarities, strict=True):
            by_source = zip(source_runs.run_names, values.tolist(), strict=True)
            table[run] = self._weights(run, dict(by_source))
        return table

    def _weights(self, run: str, similarities: dict[str, float]) -> dict[str, float]:
        nearest = sorted(similarities, key=lambda source: -similarities[source])[: self.top_k]
        weights = {source: max(similarities[source], 0.0) for source in nearest}
        if self.top_k == 1:
            weights = {nearest[0]: 1.0}
        total = sum(weights.values())
        rounded = ", ".join(f"{source} {value:.3g}" for source, value in similarities.items())
        if not total > 0:
            raise ValueError(
                f"No source has a positive similarity to {run!r} ({rounded}). Set START_FROM "
                "to the name of a source, set SPOT_TOP_K to 1 to start from the most similar "
                "source, or train from scratch (gin/pt_target.gin)."
            )
        weights = {source: round(weight / total, DECIMALS) for source, weight in weights.items()}
        weights = {source: weight for source, weight in weights.items() if weight > 0}
        shown = ", ".join(f"{source} (weight {weight:g})" for source, weight in weights.items())
        logging.info("%s starts from %s. Similarities: %s.", run, shown, rounded)
        return weights


def cosines(
    targets: np.ndarray,
    sources: np.ndarray,
    similarity: str,
    names: tuple[Sequence[str], Sequence[str]],
) -> np.ndarray:
    """Returns the similarities [K, S] of embeddings [K, P, H] and [S, P, H], in float64.

    Args:
        targets: [K, P, H], the embeddings of targets.
        sources: [S, P, H], the embeddings of sources.
        similarity: `'mean_pooled'` or `'row_pairs'`; see the module docstring.
        names: the names of the K targets and of the S sources, shown in errors.

    Raises:
        ValueError: a vector to compare is zero or not finite, so it has no direction.
    """
    target_names, source_names = names
    pooled_targets = _pool(np.asarray(targets, np.float64), similarity, target_names)
    return pooled_targets @ _pool(np.asarray(sources, np.float64), similarity, source_names).T


def _pool(prompts: np.ndarray, similarity: str, names: Sequence[str]) -> np.ndarray:
    """Returns vectors [K, H] whose dot products are the similarities.

    For `row_pairs`, the mean cosine over all pairs of rows equals the dot product of the means of
    the unit-length rows.
    """
    if similarity == "row_pairs":
        return _unit(prompts, names).mean(1)
    return _unit(prompts.mean(1), names)


def _unit(vectors: np.ndarray, names: Sequence[str]) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    undefined = ~((lengths > 0) & np.isfinite(lengths))
    if undefined.any():
        name = names[int(np.argwhere(undefined)[0, 0])]
        raise ValueError(
            f"The task embedding of {name!r} is zero or not finite, so its similarity to others is "
            "undefined. Train the embedding again with gin/spot_embeddings.gin (for a source, "
            "gin/spot_source_embeddings.gin)."
        )
    return vectors / lengths
