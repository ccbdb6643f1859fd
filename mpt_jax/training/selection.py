"""Selection of each group's best step, and early stopping, as an action after each evaluation.

Each group of a job has its own best step and its own patience. best_steps.py stores the parameters
of that step in MODEL_DIR/best; at the end of the job they are written as its artifact. The record
is keyed by step, so repeating an evaluation after a resume changes nothing. Evaluations after the
step that a job resumes from are discarded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from mpt_jax.core.comparison import abbreviate, data_changes
from mpt_jax.core.runs import entry_of_run, look_up
from mpt_jax.core.tree import flatten, split, unflatten
from mpt_jax.models.model import Model
from mpt_jax.training.actions import (
    Action,
    EarlyStoppingAction,
    Scores,
    TerminateOnNanAction,
)
from mpt_jax.training.best_steps import BestSteps
from mpt_jax.training.partitioning import to_host
from mpt_jax.training.row_transforms import row_groups
from mpt_jax.training.state import trainable_labels

# Gin files import all actions from this module.
__all__ = ["Action", "EarlyStoppingAction", "Scores", "SelectBest", "TerminateOnNanAction"]


@dataclasses.dataclass
class SelectBest:
    """Keeps each group's best parameters, and reports groups that have stopped improving.

    A group's score is the mean of its runs' metric. If scores are equal, the earliest step is the
    best. A group is not scored after it has run out of patience, has failed, or has been evaluated
    at the end of its training. The trainer may set `data`, the record of the data that scores are
    measured on, and `unscored`, the names of runs that cannot be evaluated; a group of only such
    runs has no best step and keeps its last parameters.

    Attributes:
        model: the model being trained.
        model_dir: MODEL_DIR; the best parameters are saved in its folder `best`.
        metric: the name of the metric, or a mapping from task name to metric name; None uses the
            first metric of each task.
        mode: `'max'` if higher scores are better, `'min'` if lower scores are.
        patience: the number of evaluations without improvement after which a group stops: one
            number, or one per group. With None, groups never stop.
        min_evaluations: the number of evaluations that a group needs before it can stop.

    Raises:
        ValueError: `mode` is unknown; `patience` is less than 1, or does not have one entry per
            group.
    """

    model: Model
    model_dir: str
    metric: str | Mapping[str, str] | None = None
    mode: str = "max"
    patience: int | Sequence[int] | None = None
    min_evaluations: int = 0

    def __post_init__(self):
        groups = self.model.runs.num_groups
        if self.mode not in ("max", "min"):
            raise ValueError(f"SelectBest.mode must be 'max' or 'min', got {self.mode!r}.")
        if self.patience is not None and np.min(self.patience) < 1:
            raise ValueError(
                f"SelectBest.patience must be at least 1, got {self.patience}. Raise it, or set it "
                "to None to train to the end."
            )
        if np.ndim(self.patience or 1) and len(self.patience) != groups:  # pyright: ignore
            raise ValueError(
                f"SelectBest.patience has {len(self.patience)} entries, but the job has {groups} "  # pyright: ignore
                "groups. Set it to one number, or to one number per group."
            )
        self._kept = BestSteps(self.model_dir)
        self._resumed = False
        self.data: Mapping[str, Any] = {}
        self.unscored: Collection[str] = ()
        # Step -> score of each group; None if it was not scored.
        self.history: dict[int, list[float | None]] = {}
        self.best_step = [-1] * self.model.runs.num_groups
        self.scores: dict[str, dict[str, float]] = {}  # of each run, at its group's best step
        self.trainable: dict[str, Any] | None = None

    def resume(self, step: int) -> None:
        """Restores the record of evaluations up to a step. Called once, before the first
        evaluation.

        Raises:
            ValueError: the folder has the best steps of other runs or scores of other data, is
                corrupt, or cannot be read.
        """
        self._resumed = True
        if step == 0 or not self._kept.exists():
            return
        record, trainable = self._kept.read()
        if record["run_names"] != list(self.model.runs.run_names):
            raise ValueError(
                f"{self._kept.folder} has the best steps of the runs "
                f"{abbreviate(record['run_names'])}, but this job has the runs "
                f"{abbreviate(self.model.runs.run_names)}. Choose another MODEL_DIR, or set "
                "RUN_NAMES to the recorded names."
            )
        if changes := data_changes(record.get("data", {}), self.data):
            raise ValueError(
                f"The scores in {self._kept.folder} were measured on other data ({changes}). "
                "Restore the data to resume the job, or choose another MODEL_DIR."
            )
        lost = [best > step for best in record["best_step"]]
        if any(lost):
            # These parameters have overwritten those of any earlier best step.
            logging.warning(
                "%s has parameters of step %d, but the job resumes from the earlier step %d. "
                "Selection starts over for the groups whose best step was later.",
                self._kept.folder,
                max(record["best_step"]),
                step,
            )
        if all(lost):
            return
        self.history = {
            int(at_step): [None if is_lost else s for is_lost, s in zip(lost, scores, strict=True)]
            for at_step, scores in record["history"].items()
            if int(at_step) <= step
        }
        self.best_step = [
            -1 if is_lost else best for is_lost, best in zip(lost, record["best_step"], strict=True)
        ]
        runs = self.model.runs
        lost_runs = {
            run for group in np.flatnonzero(lost).tolist() for run in runs.names_of_group(group)
        }
        self.scores = {
            run: metrics for run, metrics in record["scores"].items() if run not in lost_runs
        }
        self.trainable = trainable

    def run(self, train_state: Any, metrics_by_task: Scores) -> bool:
        """Records an evaluation, and keeps the parameters of groups that improved.

        Returns:
            True once every group has run out of patience.

        Raises:
            ValueError: a run was not evaluated, or does not have the metric.
        """
        step = int(train_state.step)
        if not self._resumed:
            self.resume(step)  # T5X does not call `resume`
        scores = self.group_scores(metrics_by_task, self._closed(train_state, step))
        self.history[step] = scores
        improved = [
            score is not None
            and (best in (-1, step) or self._better(score, self.history[best][group]))
            for group, (best, score) in enumerate(zip(self.best_step, scores, strict=True))
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
                if improved[group] and run not in self.unscored
            }
        if jax.process_index() == 0:
            record = {
                "run_names": list(self.model.runs.run_names),
                "best_step": self.best_step,
                "scores": self.scores,
                "history": self.history,
                "data": dict(self.data),
            }
            self._kept.write(record, self.trainable if any(improved) else None)
        return all(self.over)

    def group_scores(
        self, metrics_by_task: Scores, closed: Sequence[bool] = ()
    ) -> list[float | None]:
        """Returns the score of each group [G], or None for a closed group.

        Args:
            metrics_by_task: the metrics of each run.
            closed: whether each group [G] is no longer scored; such a group needs no metrics. Empty
                if all groups are scored.

        Raises:
            ValueError: a run was not evaluated, or does not have the metric.
        """
        runs = self.model.runs
        totals: list[list[float]] = [[] for _ in range(runs.num_groups)]
        for row, run in enumerate(runs.run_names):
            if run in self.unscored or (any(closed) and closed[runs.group_of_row[row]]):
                continue
            if run not in metrics_by_task:
                raise ValueError(
                    f"SelectBest needs a score of {run!r}, but only these runs were evaluated: "
                    f"{abbreviate(sorted(metrics_by_task)) or 'none'}. List SelectBest under "
                    "'INFER_EVAL' in train_script.train.actions, with every run in "
                    "infer_eval/utils.DatasetConfig, or remove SelectBest from the actions."
                )
            metrics = metrics_by_task[run]
            name = self.metric
            if isinstance(name, Mapping):
                name = entry_of_run(name, runs.task_names[row], "SelectBest.metric", "task")
            if name is None:
                name = next(iter(metrics))
            score = float(look_up(f"metric of {run} in SelectBest.metric:", name, metrics))
            totals[runs.group_of_row[row]].append(score)
        return [sum(scores) / len(scores) if scores else None for scores in totals]

    def parameters(self, train_state: Any) -> dict[str, Any]:
        """Returns the trainable parameters of each group's best step, and the current ones of
        groups that were never scored. All processes take part."""
        assert self.trainable is not None
        if min(self.best_step) >= 0:
            return self.trainable
        last = to_host(_trainable(self.model, train_state))
        return self._take(last, [step < 0 for step in self.best_step])

    def best_group_scores(self) -> list[float]:
        """Returns the best score of each group [G], or NaN for a group that was never scored."""
        return [self.best_score(group) for group in range(len(self.best_step))]

    def best_score(self, group: int) -> float:
        """Returns the best score of a group, or NaN if the group was never scored."""
        step = self.best_step[group]
        score = self.history[step][group] if step >= 0 else None
        return math.nan if score is None else score

    @property
    def over(self) -> list[bool]:
        """Whether each group [G] has run out of patience."""
        return self._over()

    def _over(self, before: int | float = math.inf) -> list[bool]:
        """Like `over`, but uses only evaluations at steps before `before`."""
        if self.patience is None:
            return [False] * len(self.best_step)
        over = []
        patience = np.broadcast_to(self.patience, len(self.best_step)).tolist()
        for group, best in enumerate(self.best_step):
            seen = self._seen(group, before)
            waited = len([step for step in seen if step > best])
            over.append(len(seen) >= self.min_evaluations and waited >= patience[group])
        return over

    def _seen(self, group: int, before: int | float = math.inf) -> list[int]:
        """Returns the steps before `before` at which a group was scored."""
        history = self.history.items()
        return [step for step, scores in history if scores[group] is not None and step < before]

    def _closed(self, train_state: Any, step: int) -> list[bool]:
        """Returns whether each group [G] is not scored at a step: because it has run out of
        patience, has failed, or was already evaluated after its last training step."""
        over = self._over(before=step)  # so repeating an evaluation changes nothing
        ended = np.asarray(getattr(train_state, "ended", [-1] * len(over)))
        failed = np.asarray(getattr(train_state, "failed", [False] * len(over)))
        after = [
            end >= 0 and any(seen >= end for seen in self._seen(group, before=step))
            for group, end in enumerate(ended)
        ]
        return [bool(any(reasons)) for reasons in zip(over, failed, after, strict=True)]

    def _better(self, new: float, old: float | None) -> bool:
        assert old is not None  # the best step has a score
        if math.isnan(old):
            return not math.isnan(new)
        return new > old if self.mode == "max" else new < old

    def _take(self, trainable: dict[str, Any], improved: list[bool]) -> dict[str, Any]:
        """Returns the best parameters so far, with rows of improved groups from `trainable`."""
        if self.trainable is None or all(improved):
            return trainable
        old = flatten(self.trainable)
        leaves = {}
        for name, leaf in flatten(trainable).items():
            groups = row_groups(name, self.model.rows, self.model.runs)
            assert groups is not None  # a single group returned above
            rows = np.asarray(improved)[np.asarray(groups)]
            leaves[name] = np.where(rows.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, old[name])
        return unflatten(leaves)


def _trainable(model: Model, train_state: Any) -> dict[str, Any]:
    """Returns the trainable parameters of a `TrainState` or of T5X's train state."""
    if hasattr(train_state, "trainable"):
        return train_state.trainable
    params = train_state.params
    return split(params, model.labels, trainable_labels(model, params))[0]
