"""What methods reached on target tasks, and how it is summed up; tables and reports read this."""

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

# What a table shows of each task, the first of these that the task declares: exact match of the
# decoded label, a correlation, or an overlap for free text.
MAIN_METRICS = ("accuracy", "matthews", "pearson", "f1", "bleu", "exact_match")
RANKED = "rank_accuracy"
FILE = "results.json"
MAJORITY_FILE = "majority.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """What one method reached at one number of examples.

    Attributes:
        method: its name.
        shots: training examples of each task; None for all.
        scores: task -> metric -> one value per seed, in percent where it is a share.
        parameters: numbers that were trained for each task.
        seconds: of its jobs.
        model_dirs: where its runs lie.
        seeds: of the values, in their order.
        prompt_length: P; 0 without a prompt.
        backbone_parameters: numbers of the model that do not learn.
        start: the source task that its prompts started from, if it was one.
        backbone: what its artifacts call the model; '' where it left none.
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
        """A task's main metric, one value per seed."""
        return self.scores[task][main_metric(self.scores[task])]

    def means(self, tasks: Sequence[str] = ()) -> list[float]:
        """The mean over tasks (default: all) of their main metric, one value per seed."""
        return np.mean([self.values(task) for task in tasks or self.scores], axis=0).tolist()


class Estimate(NamedTuple):
    """A mean of n values, their standard deviation and a 95% t-interval of the mean; the last
    three are NaN for a single value."""

    mean: float
    std: float
    low: float
    high: float
    n: int


def estimate(values: Iterable[float]) -> Estimate:
    """Sums values up.

    Raises:
        ValueError: there are none.
    """
    found = np.array(list(values), np.float64)
    if not len(found):
        raise ValueError("There is nothing to sum up.")
    if len(found) == 1:
        unknown = float("nan")
        return Estimate(float(found[0]), unknown, unknown, unknown, 1)
    half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found)
    mean = found.mean()
    return Estimate(
        float(mean), float(found.std(ddof=1)), float(mean - half), float(mean + half), len(found)
    )


def paired(new: Result, old: Result) -> list[float]:
    """Differences of the main metric, one for each (task, seed) that both have.

    Raises:
        ValueError: they have no task and seed in common.
    """
    both = [seed for seed in new.seeds if seed in old.seeds]
    found = [
        new.values(task)[new.seeds.index(seed)] - old.values(task)[old.seeds.index(seed)]
        for task in new.scores
        if task in old.scores
        for seed in both
    ]
    if not found:
        raise ValueError(f"{new.method!r} and {old.method!r} have no task and seed in common.")
    return found


def majority_share(targets: Iterable[Any]) -> float:
    """Percent of the targets that are the most frequent one."""
    counts = collections.Counter(targets)
    return 100 * max(counts.values()) / counts.total()


def by_metric(result: Result, metric: str) -> Result:
    """The result with one metric alone, in the place of each task's main metric.

    Raises:
        ValueError: a task was not scored by it; lists those that it was scored by.
    """
    for task, scores in result.scores.items():
        if metric not in scores:
            raise ValueError(unknown_name(f"metric of {task}", metric, list(scores)))
    scores = {task: {metric: found[metric]} for task, found in result.scores.items()}
    return dataclasses.replace(result, scores=scores)


def main_metric(scores: Mapping[str, object]) -> str:
    """The metric that a table shows of a task: the first of `MAIN_METRICS` in the task's own order,
    in which its best step is selected too."""
    return next((name for name in scores if name in MAIN_METRICS), next(iter(scores)))


def read_scores(folder: Path, runs: Sequence[str]) -> dict[str, dict[str, float]]:
    """Run -> metric -> value, of the last evaluation below a MODEL_DIR or EVAL_OUTPUT_DIR.

    Raises:
        FileNotFoundError: a run was not evaluated there.
    """
    scores = {}
    for run in runs:
        path = folder / "inference_eval" / f"{run}-metrics.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no evaluation of {run!r} ({path}).")
        found = json.loads(path.read_text().splitlines()[-1])
        scores[run] = {name: float(value) for name, value in found.items() if name != "step"}
    return scores


def read_record(model_dir: Path) -> dict:
    """What the run that was started last in a MODEL_DIR says of itself."""
    return json.loads((model_dir / "run.jsonl").read_text().splitlines()[-1])


def training_seconds(model_dir: Path) -> float:
    """Seconds of all training steps, from the run's own metrics; starts and evaluations apart."""
    seconds, last = 0.0, 0
    for line in (model_dir / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        each = found.get("timing/seconds_per_step")
        if found["folder"] == "train" and each is not None:
            seconds += each * max(0, found["step"] - last)
            last = found["step"]
    return seconds


def save(root: Path, results: Sequence[Result], majority: Mapping[str, float]) -> None:
    """Writes root/results.json, and beside it what answering without reading would reach.

    Args:
        root: an existing folder. Folders of runs are kept as paths from there, so that they may
            move.
        results: what was run.
        majority: task -> percent of its test rows that have the most frequent target, if known.
    """
    lines = []
    for result in results:
        dirs = [os.path.relpath(name, root) for name in result.model_dirs]
        lines.append({**dataclasses.asdict(result), "model_dirs": dirs})
    write_atomic(root / FILE, json.dumps(lines, indent=2) + "\n")
    write_atomic(root / MAJORITY_FILE, json.dumps(majority, indent=2) + "\n")


def load_majority(root: Path) -> dict[str, float]:
    """The shares that `save` was given; {} where there is no such file."""
    path = root / MAJORITY_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def load(root: Path) -> list[Result]:
    """Reads root/results.json.

    Raises:
        FileNotFoundError: there is none.
    """
    path = root / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{root} holds no {FILE}, which `mpt-jax demo` and `mpt-jax paper` leave."
        )
    found = []
    for fields in json.loads(path.read_text()):
        dirs = tuple(os.path.normpath(root / name) for name in fields["model_dirs"])
        found.append(Result(**{**fields, "model_dirs": dirs, "seeds": tuple(fields["seeds"])}))
    return found
