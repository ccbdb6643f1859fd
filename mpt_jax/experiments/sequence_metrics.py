"""Metrics of a sequence of tasks: average, last, forgetting, and mAP over the classes so far.

    python -m mpt_jax.experiments.sequence_metrics runs/multilane_1 runs/multilane_2 ...

prints them for the jobs of a sequence, one for each stage, in order. A stage's score is the mean
over its classes for mAP, and over its tasks for other metrics.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mpt_jax.artifacts import artifacts
from mpt_jax.core.shapes import Float
from mpt_jax.evaluation.finalize import ARTIFACT
from mpt_jax.runtime.exits import exit_with

METRICS = ("last", "average", "forgetting")  # of a table; variants are compared by the first
CLASSES = "_classes"  # suffix of the metric that counts the classes of a mean


@dataclasses.dataclass(frozen=True)
class SequenceScores:
    """Scores of a sequence of T tasks, in the unit of the metric.

    Attributes:
        of_steps: the score of each stage, over the tasks so far.
        average: the mean of `of_steps`; amAP if the metric is mAP.
        last: the score of the last stage.
        forgetting: the mean over all tasks except the last of the best score at an earlier stage,
            minus the score at the last stage; 0 for one task.
        backward_transfer: the mean over all tasks except the last of the score at the last stage,
            minus the score at the task's own stage; 0 for one task.
    """

    of_steps: tuple[float, ...]
    average: float
    last: float
    forgetting: float
    backward_transfer: float


def sequence_scores(
    scores: Float[np.ndarray, "T T"], counts: Float[np.ndarray, "T T"] | None = None
) -> SequenceScores:
    """Returns the metrics of a sequence.

    Args:
        scores: the score of each task (column) after each stage (row); only those of tasks so far,
            on and below the diagonal, are read.
        counts: the weight of each score in its stage, such as the number of classes with positive
            examples, whose mean a mAP is; None for equal weights.

    Raises:
        ValueError: there is no task, a score is not finite, or all weights of a stage are 0.
    """
    size = len(scores)
    weights = np.ones((size, size)) if counts is None else counts
    so_far = np.tri(size, dtype=bool)
    read = np.where(so_far, scores, 0.0)
    used = np.where(so_far, weights, 0.0)
    if not size or not np.isfinite(read).all() or not (used >= 0).all() or not used.any(1).all():
        raise ValueError(
            f"The scores of {size} tasks are not finite, or a stage has no classes. Pass the score "
            "of every task at its own and all later stages."
        )
    steps = (read * used).sum(1) / used.sum(1)
    early = range(size - 1)
    forgotten = [scores[k : size - 1, k].max() - scores[-1, k] for k in early]
    gained = [scores[-1, k] - scores[k, k] for k in early]
    mean = lambda values: float(np.mean(values)) if values else 0.0  # noqa: E731
    return SequenceScores(
        tuple(steps.tolist()), float(steps.mean()), float(steps[-1]), mean(forgotten), mean(gained)
    )


def of_stages(
    stages: Sequence[Mapping[str, Mapping[str, float]]], metric: str | None = None
) -> tuple[str, SequenceScores, np.ndarray | None]:
    """Returns the metrics of the stages of one sequence.

    Args:
        stages: {run: {metric: value}} of each stage, with the runs in the order of the sequence.
        metric: the name of the metric; None for the first of the first run.

    Returns:
        The name of the metric, its scores, and the number of classes that each stage's score is a
        mean of; None if the metric counts no classes.

    Raises:
        ValueError: stage t does not have the first t runs of the last stage, or lacks the metric.
    """
    names = list(stages[-1]) if stages else []
    if not names or any(set(found) != set(names[: i + 1]) for i, found in enumerate(stages)):
        shown = "; ".join(f"{', '.join(found)}" for found in stages)
        raise ValueError(
            f"These jobs are not the stages of one sequence, since they have the runs {shown}. "
            "Pass the folders of all its stages, in order."
        )
    metric = metric or next(iter(stages[0][names[0]]))
    size = len(stages)
    scores, counts = np.full((size, size), math.nan), np.full((size, size), math.nan)
    for step, found in enumerate(stages):
        for number, name in enumerate(names[: step + 1]):
            if metric not in found[name]:
                raise ValueError(
                    f"Stage {step + 1} has no {metric} of {name}, only {', '.join(found[name])}. "
                    "Pass another --metric."
                )
            scores[step, number] = found[name][metric]
            counts[step, number] = found[name].get(metric + CLASSES, math.nan)
    counted = bool(np.isfinite(counts[np.tri(size, dtype=bool)]).all())
    classes = np.where(np.tri(size), counts, 0).sum(1) if counted else None
    return metric, sequence_scores(scores, counts if counted else None), classes


def of_joint(found: Mapping[str, Mapping[str, float]], metric: str | None = None) -> SequenceScores:
    """Returns the metrics of a job that trains all tasks of a sequence at once: its score is the
    average and the last, and nothing is forgotten. Arguments are those of `of_stages`, for a job.
    """
    name = metric or next(iter(next(iter(found.values()))))
    scores = np.array([scores[name] for scores in found.values()])
    counts = np.array([scores.get(name + CLASSES, 1.0) for scores in found.values()])
    score = float((scores * counts).sum() / counts.sum())
    return SequenceScores((score,), score, score, 0.0, 0.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the metrics of the jobs of a sequence."""
    parser = argparse.ArgumentParser(prog="python -m mpt_jax.experiments.sequence_metrics")
    parser.add_argument(
        "model_dirs", nargs="+", type=Path, help="MODEL_DIR of each stage, in order"
    )
    parser.add_argument("--metric", help="name of the metric; by default a task's first")
    given = parser.parse_args(arguments)
    try:
        _print(given.model_dirs, given.metric)
    except (OSError, ValueError) as error:
        exit_with(parser.prog, error)


def _print(model_dirs: Sequence[Path], metric: str | None) -> None:
    """Prints the metrics.

    Raises:
        FileNotFoundError, ValueError: a folder has no artifact or no scores, or as in `of_stages`.
    """
    found = [artifacts.load_artifact(folder / ARTIFACT) for folder in model_dirs]
    stages = []
    for folder, artifact in zip(model_dirs, found, strict=True):
        scores = artifact.config["metrics"].get("scores") or {}
        if missing := [name for name in artifact.runs.run_names if name not in scores]:
            raise ValueError(
                f"{folder} has no scores of {missing[0]}. Set EVAL_PERIOD, so that the job "
                "evaluates its runs."
            )
        stages.append({name: scores[name] for name in artifact.runs.run_names})
    metric, result, classes = of_stages(stages, metric)
    for step, score in enumerate(result.of_steps):
        over = f" over {classes[step]:.0f} classes" if classes is not None else ""
        print(f"stage {step + 1}: {metric} {score:.2f}{over}")
    print(f"average {result.average:.2f}, last {result.last:.2f}")
    print(f"forgetting {result.forgetting:.2f}, backward transfer {result.backward_transfer:.2f}")


if __name__ == "__main__":
    main()
