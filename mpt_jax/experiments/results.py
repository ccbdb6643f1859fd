"""Scores of methods on target tasks, with summary statistics, for tables and reports."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from scipy import stats

from mpt_jax.artifacts.model_card import CONSTANT
from mpt_jax.core import schema
from mpt_jax.core.old_names import existing_folder
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
        method: The name of the method.
        shots: The number of training examples of each task; None for all.
        scores: Task -> metric -> one value per seed. Metrics that are shares are in percent.
        parameters: The trainable parameters of the first job, divided by the number of its runs.
        seconds: The total time of the training steps of its jobs, in seconds. In the demo, the time
            that the last `mpt-jax demo` spent on these jobs.
        model_dirs: The folders of its jobs.
        seeds: The seeds, in the order of the values of a score.
        prompt_length: The prompt length P; 0 without a prompt.
        backbone_parameters: The number of frozen parameters of the model.
        start: The source task whose prompt initialized all prompts, if any.
        backbone: The backbone's name in the first job's artifact; '' without an artifact.
        source_seconds: The same of the source stages that its jobs need, which other methods may
            need as well; None if unknown.
        stored: The method's parameters in the first job's artifact, without the plain prompts that
            it also holds, divided by the number of its runs; without an artifact, `parameters`.
        operations: The operations of the training steps of its jobs (`costs`); 0 if a job does not
            record its lengths.
        repeat_stds: Task -> metric -> standard deviation over random seeds on the same examples;
            {} for a task whose runs were not repeated.
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
    source_seconds: float | None = None
    stored: float = 0.0
    operations: float = 0.0
    repeat_stds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def values(self, task: str) -> list[float]:
        """Returns the main metric of a task, one value per seed."""
        return self.scores[task][main_metric(self.scores[task])]

    def means(self, tasks: Sequence[str] = ()) -> list[float]:
        """Returns the mean main metric over tasks (default: all), one value per seed."""
        return np.mean([self.values(task) for task in tasks or self.scores], axis=0).tolist()


class Record(msgspec.Struct):
    """The schema of a line of run.jsonl, with only the fields that results need."""

    parameters: schema.Amount
    trainable_parameters: schema.Amount
    method_config: dict[str, Any]
    prompt_length: schema.Count | None = None
    batch_size: schema.Amount | None = None
    total_steps: schema.Count | None = None
    backbone_config: dict[str, Any] | None = None
    task_feature_lengths: dict[str, Any] | None = None


class ArtifactConfig(msgspec.Struct):
    """The schema of an artifact's config.json, with only the fields that results need."""

    backbone: str = ""
    shapes: dict[str, list[schema.Count]] = msgspec.field(default_factory=dict)


class Timing(msgspec.Struct):
    """The schema of a line of metrics.jsonl, with only the fields that `training_seconds` needs."""

    folder: str
    step: schema.Count
    seconds_per_step: float | None = msgspec.field(default=None, name="timing/seconds_per_step")


class Estimate(NamedTuple):
    """Mean of n values, with their standard deviation and a 95% t-interval of the mean. Standard
    deviation and interval are NaN for a single value."""

    mean: float
    std: float
    low: float
    high: float
    n: int


def estimate(values: Iterable[float]) -> Estimate:
    """Returns the mean of values, with their standard deviation and a 95% t-interval.

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


def p_value(differences: Sequence[float]) -> float:
    """Returns the two-sided p-value of a t-test that the mean of paired differences is 0; NaN for a
    single difference, and for differences that are all equal except for rounding, whose spread is
    unknown."""
    array = np.array(differences, np.float64)
    if len(array) < 2 or np.allclose(array, array[0], rtol=1e-9, atol=1e-9):
        return float("nan")
    return float(stats.ttest_1samp(array, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values that are corrected for their number (Holm, 1979): the probability of any
    false positive in the family is at most the threshold. NaN is kept and not counted."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not np.isnan(p))
    corrected, largest = [float("nan")] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected


def paired(new: Result, old: Result, tasks: Sequence[str] = ()) -> list[float]:
    """Returns new minus old of the main metric for each seed that both results have, as the mean
    over tasks (default: all that both have).

    Raises:
        ValueError: the results have no task and seed in common.
    """
    return np.mean(_differences(new, old, tasks), axis=0).tolist()


def paired_by_task(new: Result, old: Result, tasks: Sequence[str] = ()) -> list[float]:
    """Returns new minus old of the main metric for each task, as the mean over the seeds that both
    results have; `tasks` and errors are as in `paired`."""
    return np.mean(_differences(new, old, tasks), axis=1).tolist()


def _differences(new: Result, old: Result, tasks: Sequence[str]) -> np.ndarray:
    """Returns new minus old of the main metric, [tasks, common seeds]."""
    seeds = [seed for seed in new.seeds if seed in old.seeds]
    tasks = tasks or [task for task in new.scores if task in old.scores]
    if not seeds or not tasks:
        raise ValueError(
            f"{new.method!r} and {old.method!r} have no task and seed in common. Run both on the "
            "same tasks and seeds."
        )
    of_seeds = lambda result, task: [  # noqa: E731
        result.values(task)[result.seeds.index(seed)] for seed in seeds
    ]
    return np.array([np.subtract(of_seeds(new, task), of_seeds(old, task)) for task in tasks])


def majority_share(targets: Iterable[Any]) -> float:
    """Returns the share of the most frequent target, in percent."""
    counts = collections.Counter(targets)
    return 100 * max(counts.values()) / counts.total()


def by_metric(result: Result, metric: str) -> Result:
    """Returns the result with only one metric, which thus becomes the main metric of each task.

    Raises:
        ValueError: a task has no such metric. The message lists its metrics.
    """
    for task, scores in result.scores.items():
        if metric not in scores:
            raise ValueError(unknown_name(f"{task} metric", metric, list(scores)))
    scores = {task: {metric: by_name[metric]} for task, by_name in result.scores.items()}
    return dataclasses.replace(result, scores=scores)


def main_metric(scores: Mapping[str, object]) -> str:
    """Returns the metric that tables show for a task: the first of its metrics that is in
    `MAIN_METRICS`, or else its first metric. By default, the best step is selected by a task's
    first metric."""
    return next((name for name in scores if name in MAIN_METRICS), next(iter(scores)))


def read_scores(folder: Path, runs: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns run -> metric -> value of the last evaluation in a MODEL_DIR or EVAL_OUTPUT_DIR.

    Raises:
        FileNotFoundError: a run was not evaluated.
    """
    scores = {}
    for run in runs:
        path = folder / "inference_eval" / f"{run}-metrics.jsonl"
        if not path.exists():
            raise FileNotFoundError(
                f"The stage in {folder} has no evaluation of run {run!r}: {path} does not exist. "
                "Rerun the stage until it finishes."
            )
        metrics = schema.load(_last_line(path), dict[str, float], f"The last line of {path}")
        scores[run] = {name: value for name, value in metrics.items() if name != "step"}
    return scores


def by_name(scores: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Returns metric -> one value per seed, given the scores of each seed. `CONSTANT` counts as
    0 for seeds that lack it, and is omitted if all seeds lack it."""
    names = dict.fromkeys([*scores[0], *(CONSTANT for seed in scores if CONSTANT in seed)])
    return {
        name: [seed.get(name, 0.0) if name == CONSTANT else seed[name] for seed in scores]
        for name in names
    }


def over_repeats(scores: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Returns metric -> one value per seed, the mean over its repeats.

    Args:
        scores: For each seed, metric -> one value per repeat (`by_name`).
    """
    return by_name([{name: float(np.mean(x)) for name, x in seed.items()} for seed in scores])


def repeat_stds(scores: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Returns metric -> standard deviation over repeats of the same seed, pooled over seeds; {} if
    seeds were not repeated. `scores` is as in `over_repeats`."""
    return {
        name: float(np.sqrt(np.mean([np.var(seed[name], ddof=1) for seed in scores])))
        for name in scores[0]
        if all(len(seed.get(name, ())) > 1 for seed in scores)
    }


def read_record(model_dir: Path) -> dict:
    """Returns the record of the job's last start, from run.jsonl in a MODEL_DIR."""
    path = model_dir / "run.jsonl"
    record = schema.parse(_last_line(path), f"The last line of {path}")
    schema.check(record, Record, f"The last line of {path}")
    return record


def read_artifact_config(folder: Path) -> ArtifactConfig:
    """Returns the fields of an artifact's config.json; without an artifact, their defaults."""
    path = existing_folder(folder) / "config.json"
    if not path.exists():
        return ArtifactConfig()
    return schema.load(path.read_bytes(), ArtifactConfig, f"{path}")


def _last_line(path: Path) -> str:
    lines = path.read_text().splitlines()
    if not lines:
        raise ValueError(f"{path} is empty. Rerun the stage that writes it until it finishes.")
    return lines[-1]


def training_seconds(model_dir: Path) -> float:
    """Returns the total time of the training steps in metrics.jsonl, in seconds."""
    seconds, last = 0.0, 0
    for line in (model_dir / "metrics.jsonl").read_text().splitlines():
        metrics = schema.load(line, Timing, f"A line of {model_dir / 'metrics.jsonl'}")
        if metrics.folder == "train" and metrics.seconds_per_step is not None:
            seconds += metrics.seconds_per_step * max(0, metrics.step - last)
            last = metrics.step
    return seconds


def save(root: Path, results: Sequence[Result], majority: Mapping[str, float]) -> None:
    """Writes results.json and majority.json.

    Args:
        root: An existing folder. Run folders are stored as paths relative to it, so that results
            and runs can be moved together.
        results: The results to write.
        majority: Task -> majority-class share of its test split in percent, for tasks with a known
            share.
    """
    lines = []
    for result in results:
        folders = [os.path.relpath(name, root) for name in result.model_dirs]
        lines.append({**dataclasses.asdict(result), "model_dirs": folders})
    write_atomic(root / FILE, json.dumps(lines, indent=2) + "\n")
    write_atomic(root / MAJORITY_FILE, json.dumps(majority, indent=2) + "\n")


def load_majority(root: Path) -> dict[str, float]:
    """Returns the majority-class shares that `save` wrote, or {} if the file is missing."""
    path = root / MAJORITY_FILE
    return schema.load(path.read_bytes(), dict[str, float], f"{path}") if path.exists() else {}


def load(root: Path) -> list[Result]:
    """Returns the results in results.json.

    Raises:
        FileNotFoundError: the folder has no results.json.
        ValueError: results.json is damaged.
    """
    path = root / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{root} contains no {FILE}. Run `mpt-jax demo` or `mpt-jax paper` first, or pass a "
            "folder that one of them wrote."
        )
    loaded = []
    for result in schema.load(path.read_bytes(), list[Result], f"{path}"):
        folders = tuple(os.path.normpath(root / name) for name in result.model_dirs)
        loaded.append(dataclasses.replace(result, model_dirs=folders))
    return loaded
