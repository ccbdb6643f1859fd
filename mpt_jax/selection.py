"""Which step of a run is its best, and when to stop: actions after an evaluation.

Each group of a job has its own best step. Its parameters at that step are kept in MODEL_DIR/best
and become the artefact at the end. Everything is keyed by step, so repeating an evaluation after a
resume changes nothing, and what was seen after the step that a run resumes from is forgotten.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from etils import epath
from safetensors.numpy import load, save

from mpt_jax.models import PromptedEncoderDecoder
from mpt_jax.optimizers import row_groups
from mpt_jax.partitioning import to_host
from mpt_jax.runs import unknown_name
from mpt_jax.train_state import trainable_labels
from mpt_jax.tree import flatten, split, unflatten

Scores = Mapping[str, Mapping[str, float]]
FOLDER, HISTORY, PARAMETERS = "best", "history.json", "trainable.safetensors"


@runtime_checkable
class Action(Protocol):
    """What may happen after an evaluation. T5X's protocol."""

    def run(self, train_state: Any, metrics_by_task: Scores) -> bool:
        """Looks at the scores of each run; True ends training."""
        ...


@dataclasses.dataclass
class SelectBest:
    """Keeps each group's best parameters, and may stop when no group improves any more.

    A group's score is the mean of its runs' metric. The earlier of two equal steps is the best.

    Attributes:
        model: the model being trained.
        model_dir: MODEL_DIR; the best parameters lie in its folder `best`.
        metric: the name of the metric, or task name -> metric; None takes the first metric of
            each task.
        mode: `'max'` or `'min'`.
        patience: stop after this many evaluations without an improvement in any group; None
            never stops.
        min_evaluations: not before this many evaluations.
    """

    model: PromptedEncoderDecoder
    model_dir: str
    metric: str | Mapping[str, str] | None = None
    mode: str = "max"
    patience: int | None = None
    min_evaluations: int = 0

    def __post_init__(self):
        if self.mode not in ("max", "min"):
            raise ValueError(f"SelectBest.mode must be 'max' or 'min', got {self.mode!r}.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"SelectBest.patience must be at least 1, got {self.patience}.")
        self._folder = epath.Path(self.model_dir) / FOLDER
        self._resumed = False
        self.history: dict[int, list[float]] = {}
        self.best_step = [-1] * self.model.runs.num_groups
        self.scores: dict[str, dict[str, float]] = {}  # of each run, at its group's best step
        self.trainable: dict[str, Any] | None = None

    def resume(self, step: int) -> None:
        """Reads what was kept up to a step; called once, before the first evaluation.

        Raises:
            ValueError: the folder belongs to other runs.
        """
        self._resumed = True
        if step == 0 or not (self._folder / HISTORY).exists():
            return
        record = json.loads((self._folder / HISTORY).read_text())
        if record["run_names"] != list(self.model.runs.run_names):
            raise ValueError(
                f"{self._folder} keeps the best of the runs {record['run_names']}, and these are "
                f"{list(self.model.runs.run_names)}. Choose another MODEL_DIR."
            )
        if max(record["best_step"]) > step:
            # The parameters of an earlier best step were overwritten by these.
            logging.warning(
                "%s keeps parameters of step %d; the run goes on from step %d and selects anew.",
                self._folder,
                max(record["best_step"]),
                step,
            )
            return
        history = {int(found): scores for found, scores in record["history"].items()}
        self.history = {found: scores for found, scores in history.items() if found <= step}
        self.best_step, self.scores = record["best_step"], record["scores"]
        leaves = load((self._folder / PARAMETERS).read_bytes())
        self.trainable = unflatten(leaves)

    def run(self, train_state: Any, metrics_by_task: Scores) -> bool:
        """Records an evaluation; True once patience is over."""
        step, scores = int(train_state.step), self.group_scores(metrics_by_task)
        if not self._resumed:
            self.resume(step)  # under T5X, which does not call it
        self.history[step] = scores
        improved = [
            best in (-1, step) or self._better(scores[group], self.history[best][group])
            for group, best in enumerate(self.best_step)
        ]
        if any(improved):
            self.trainable = self._take(to_host(_trainable(self.model, train_state)), improved)
            self.best_step = [
                step if new else old for new, old in zip(improved, self.best_step, strict=True)
            ]
            runs = zip(self.model.runs.run_names, self.model.runs.group_of_row, strict=True)
            self.scores |= {
                run: {name: float(value) for name, value in metrics_by_task[run].items()}
                for run, group in runs
                if improved[group]
            }
        if jax.process_index() == 0:
            self._write(params_changed=any(improved))
        return self._is_over(step)

    def group_scores(self, metrics_by_task: Scores) -> list[float]:
        """Each group's score [G].

        Raises:
            ValueError: a run was not evaluated, or has no such metric.
        """
        runs = self.model.runs
        totals: list[list[float]] = [[] for _ in range(runs.num_groups)]
        for row, run in enumerate(runs.run_names):
            if run not in metrics_by_task:
                raise ValueError(
                    f"SelectBest needs a score of {run!r}, but only {sorted(metrics_by_task)} "
                    "were evaluated; evaluate every run (infer_eval) or leave SelectBest out."
                )
            found = metrics_by_task[run]
            name = self.metric
            if isinstance(name, Mapping):
                name = name[runs.task_names[row]]
            if name is None:
                name = next(iter(found))
            if name not in found:
                raise ValueError(unknown_name(f"metric of {run}", name, list(found)))
            totals[runs.group_of_row[row]].append(float(found[name]))
        return [sum(scores) / len(scores) for scores in totals]

    def best_group_scores(self) -> list[float]:
        """Each group's best score [G]; NaN before the first evaluation."""
        return [
            self.history[step][group] if step >= 0 else math.nan
            for group, step in enumerate(self.best_step)
        ]

    def _better(self, new: float, old: float) -> bool:
        if math.isnan(old):
            return not math.isnan(new)
        return new > old if self.mode == "max" else new < old

    def _is_over(self, step: int) -> bool:
        seen = sorted(found for found in self.history if found <= step)
        if self.patience is None or len(seen) < self.min_evaluations:
            return False
        return len([found for found in seen if found > max(self.best_step)]) >= self.patience

    def _take(self, trainable: dict[str, Any], improved: list[bool]) -> dict[str, Any]:
        """The rows of improved groups from `trainable`, all others from the best so far."""
        if self.trainable is None or all(improved):
            return trainable
        old = flatten(self.trainable)
        leaves = {}
        for name, leaf in flatten(trainable).items():
            groups = row_groups(name, self.model.rows, self.model.runs)
            assert groups is not None  # one group alone is either improved or not
            rows = np.asarray(improved)[np.asarray(groups)]
            leaves[name] = np.where(rows.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, old[name])
        return unflatten(leaves)

    def _write(self, params_changed: bool) -> None:
        """Parameters first: a history that names a step implies that its parameters are there."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if params_changed:
            assert self.trainable is not None
            leaves = {k: np.ascontiguousarray(v) for k, v in flatten(self.trainable).items()}
            _replace(self._folder / PARAMETERS, save(leaves))
        record = {
            "run_names": list(self.model.runs.run_names),
            "best_step": self.best_step,
            "scores": self.scores,
            "history": self.history,
        }
        _replace(self._folder / HISTORY, json.dumps(record).encode())


def _replace(path: epath.Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash, meets the old content or the new."""
    new = path.parent / f".{path.name}.{os.getpid()}.new"
    new.write_bytes(content)
    new.replace(path)


def _trainable(model: PromptedEncoderDecoder, train_state: Any) -> dict[str, Any]:
    """What learns, in our train state or T5X's."""
    if hasattr(train_state, "trainable"):
        return train_state.trainable
    params = train_state.params
    return split(params, model.labels, trainable_labels(model, params))[0]


# --- T5X's own actions ---------------------------------------------------------------------------


@dataclasses.dataclass
class EarlyStoppingAction:
    """Stops when one metric of one task has not improved for a while. Fields are T5X's.

    Attributes:
        metric: (task name, metric name).
        mode: `'max'` or `'min'`.
        patience: how many evaluations in a row without improvement.
        atol: a change within it is no improvement.
        rtol: the same, relative to the best.
    """

    metric: tuple[str, str]
    mode: str
    patience: int = 3
    atol: float = 0.0
    rtol: float = 0.0

    def __post_init__(self):
        if self.mode not in ("max", "min"):
            raise ValueError(f"EarlyStoppingAction.mode must be 'max' or 'min', got {self.mode!r}.")
        self._best: float | None = None
        self._waited = 0

    def run(self, train_state: Any, metrics_by_task: Scores) -> bool:
        """True once patience is over."""
        task, metric = self.metric
        if task not in metrics_by_task:
            raise ValueError(unknown_name("evaluated task", task, list(metrics_by_task)))
        if metric not in metrics_by_task[task]:
            raise ValueError(unknown_name(f"metric of {task}", metric, list(metrics_by_task[task])))
        value = float(metrics_by_task[task][metric])
        if math.isnan(value):  # is no improvement, and nothing to improve upon
            self._waited += 1
            return self._waited >= self.patience
        gain = math.inf if self._best is None else value - self._best
        gain = gain if self.mode == "max" or self._best is None else -gain
        if gain > self.atol + self.rtol * abs(self._best or 0.0):
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        return self._waited >= self.patience


@dataclasses.dataclass
class TerminateOnNanAction:
    """Stops when a metric of a task is not a number. Fields are T5X's; our trainer checks every
    training step by itself."""

    task: str
    metric: str = "loss"

    def run(self, train_state: Any, metrics_by_task: Scores) -> bool:
        """True on NaN or infinity."""
        if self.task not in metrics_by_task:
            raise ValueError(unknown_name("evaluated task", self.task, list(metrics_by_task)))
        found = metrics_by_task[self.task]
        if self.metric not in found:
            raise ValueError(unknown_name(f"metric of {self.task}", self.metric, list(found)))
        return not math.isfinite(found[self.metric])
