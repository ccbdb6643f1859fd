"""Scores of methods on target tasks and their summary statistics, for tables and reports."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mpt_jax.core.runs import unknown_name
from mpt_jax.runtime.files import write_atomic

# A table shows one of these for each task, the first that the task declares: exact match of the
# decoded label, a correlation, or an overlap for free text.
MAIN_METRICS = ("accuracy", "matthews", "pearson", "f1", "bleu", "exact_match")
RANKED = "rank_accuracy"
FILE = "results.json"
MAJORITY_FILE = "majority.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of one method at one number of examples.

    Attributes:
        method: its name.
        shots: training examples of each task; None for all.
        scores: task -> metric -> one value per seed; shares are in percent.
        parameters: trainable parameters per task.
        seconds: run time of its jobs.
        model_dirs: folders of its jobs.
        seeds: seeds of the values, in the same order.
        prompt_length: P; 0 without a prompt.
        backbone_parameters: frozen parameters of the model.
        start: the source task whose prompt its prompts started from, if any.
        backbone: the model's name in its artifacts; '' if it wrote no artifact.
    """

    method: str
    shots: int | None
    scores: dict[str, dict[str, list[float]]]
    parameters: float
    seconds: float
    model_dirs: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    prompt_length: int = 0
    backbone_parameters: int = 0
    start: str | None = None
    backbone: str = ""

    def values(self, task: str) -> list[float]:
        """Returns the main metric of a task, one value per seed."""
        return self.scores[task][main_metric(self.scores[task])]

    def means(self, tasks: Sequence[str] = ()) -> list[float]:
        """Returns the mean main metric over tasks (default: all), one value per seed."""
        return np.mean([self.values(task) for task in tasks or self.scores], axis=0).tolist()


class Estimate(NamedTuple):
    """A mean of n values, their standard deviation and a 95% t-interval of the mean. Deviation and
    interval are NaN for a single value."""

    mean: float
    std: float
    low: float
    high: float
    n: int


def estimate(values: Iterable[float]) -> Estimate:
    """Returns the mean, deviation and interval of values.

    Raises:
        ValueError: `values` is empty.
    """
    array = np.array(list(values), np.float64)
    if not len(array):
        raise ValueError("Cannot estimate the mean of an empty list. Pass at least one value.")
    if len(array) == 1:
        unknown = float("nan")
        return Estimate(float(array[0]), unknown, unknown, unknown, 1)
    half = stats.t.ppf(0.975, len(array) - 1) * stats.sem(array)
    mean = array.mean()
    return Estimate(
        float(mean), float(array.std(ddof=1)), float(mean - half), float(mean + half), len(array)
    )


def paired(new: Result, old: Result) -> list[float]:
    """Returns differences of the main metric, one for each (task, seed) that both results have.

    Raises:
        ValueError: they have no task and seed in common.
    """
    seeds = [seed for seed in new.seeds if seed in old.seeds]
    differences = [
        new.values(task)[new.seeds.index(seed)] - old.values(task)[old.seeds.index(seed)]
        for task in new.scores
        if task in old.scores
        for seed in seeds
    ]
    if not differences:
        raise ValueError(
            f"{new.method!r} and {old.method!r} have no task and seed in common. Run both on the "
            "same tasks and seeds."
        )
    return differences


def majority_share(targets: Iterable[Any]) -> float:
    """Returns the share of the most frequent target, in percent."""
    counts = collections.Counter(targets)
    return 100 * max(counts.values()) / counts.total()


def by_metric(result: Result, metric: str) -> Result:
    """Returns the result with only one metric, which then is each task's main metric.

    Raises:
        ValueError: a task was not scored by this metric; the error lists its metrics.
    """
    for task, scores in result.scores.items():
        if metric not in scores:
            raise ValueError(unknown_name(f"metric of {task}", metric, list(scores)))
    scores = {task: {metric: by_name[metric]} for task, by_name in result.scores.items()}
    return dataclasses.replace(result, scores=scores)


def main_metric(scores: Mapping[str, object]) -> str:
    """Returns the metric that a table shows for a task: the first of `MAIN_METRICS` in the task's
    own order. The best step is selected in the same order."""
    return next((name for name in scores if name in MAIN_METRICS), next(iter(scores)))


def read_scores(folder: Path, runs: Sequence[str]) -> dict[str, dict[str, float]]:
    """Reads the last evaluation below a MODEL_DIR or EVAL_OUTPUT_DIR: run -> metric -> value.

    Raises:
        FileNotFoundError: a run was not evaluated.
    """
    scores = {}
    for run in runs:
        path = folder / "inference_eval" / f"{run}-metrics.jsonl"
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} holds no evaluation of {run!r}: {path} does not exist. Run the stage to "
                "its end first."
            )
        metrics = json.loads(path.read_text().splitlines()[-1])
        scores[run] = {name: float(value) for name, value in metrics.items() if name != "step"}
    return scores


def read_record(model_dir: Path) -> dict:
    """Reads the record of the last start in a MODEL_DIR, from run.jsonl."""
    return json.loads((model_dir / "run.jsonl").read_text().splitlines()[-1])


def training_seconds(model_dir: Path) -> float:
    """Returns the seconds of all training steps in metrics.jsonl, excluding other run time."""
    seconds, last = 0.0, 0
    for line in (model_dir / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        per_step = metrics.get("timing/seconds_per_step")
        if metrics["folder"] == "train" and per_step is not None:
            seconds += per_step * max(0, metrics["step"] - last)
            last = metrics["step"]
    return seconds


def save(root: Path, results: Sequence[Result], majority: Mapping[str, float]) -> None:
    """Writes results.json and majority.json.

    Args:
        root: an existing folder. Folders of runs are stored as relative paths, so that everything
            can be moved together.
        results: results to write.
        majority: task -> majority-class share of its test split in percent, if known.
    """
    lines = []
    for result in results:
        folders = [os.path.relpath(name, root) for name in result.model_dirs]
        lines.append({**dataclasses.asdict(result), "model_dirs": folders})
    write_atomic(root / FILE, json.dumps(lines, indent=2) + "\n")
    write_atomic(root / MAJORITY_FILE, json.dumps(majority, indent=2) + "\n")


def load_majority(root: Path) -> dict[str, float]:
    """Reads the majority-class shares that `save` wrote; {} if the file is missing."""
    path = root / MAJORITY_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def load(root: Path) -> list[Result]:
    """Reads results.json.

    Raises:
        FileNotFoundError: the folder has no results.json.
    """
    path = root / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{root} holds no {FILE}. Run `mpt-jax demo` or `mpt-jax paper` first, or pass a "
            "folder that one of them wrote."
        )
    loaded = []
    for fields in json.loads(path.read_text()):
        folders = tuple(os.path.normpath(root / name) for name in fields["model_dirs"])
        loaded.append(Result(**{**fields, "model_dirs": folders, "seeds": tuple(fields["seeds"])}))
    return loaded
