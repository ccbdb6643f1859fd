"""Which step of a run is its best, and when to stop: actions after an evaluation.

Each group of a job has its own best step, and its own patience. Its parameters at that step are
kept in MODEL_DIR/best and become the artifact at the end. Everything is keyed by step, so repeating
an evaluation after a resume changes nothing, and what was seen after the step that a run resumes
from is forgotten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from etils import epath
from safetensors.numpy import load, save

from mpt_jax.core.runs import unknown_name
from mpt_jax.core.tree import flatten, split, unflatten
from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
from mpt_jax.runtime.files import write_atomic
from mpt_jax.training.partitioning import to_host
from mpt_jax.training.row_transforms import row_groups
from mpt_jax.training.state import trainable_labels

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
    """Keeps each group's best parameters, and says which groups improve no more.

    A group's score is the mean of its runs' metric. The earlier of two equal steps is the best. A
    group that is over, has failed, or was evaluated after its last step is looked at no more.

    Attributes:
        model: the model being trained.
        model_dir: MODEL_DIR; the best parameters lie in its folder `best`.
        metric: the name of the metric, or task name -> metric; None takes the first metric of
            each task.
        mode: `'max'` or `'min'`.
        patience: a group is over after this many evaluations without an improvement of its own;
            one number, or one for each group. None: never.
        min_evaluations: not before this many evaluations of it.
    """

    model: PromptedEncoderDecoder
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
            raise ValueError(f"SelectBest.patience must be at least 1, got {self.patience}.")
        if np.ndim(self.patience or 1) and len(self.patience) != groups:  # pyright: ignore
            raise ValueError(
                f"SelectBest.patience has {len(self.patience)} entries, but there are {groups} "  # pyright: ignore
                "groups; give one number or one for each group."
            )
        self._folder = epath.Path(self.model_dir) / FOLDER
        self._resumed = False
        self._written: dict[str, Any] | None = None  # the last record
        self._digest = ""  # of the parameters kept
        # Step -> score of each group; None where it was not looked at.
        self.history: dict[int, list[float | None]] = {}
        self.best_step = [-1] * self.model.runs.num_groups
        self.scores: dict[str, dict[str, float]] = {}  # of each run, at its group's best step
        self.trainable: dict[str, Any] | None = None

    def resume(self, step: int) -> None:
        """Reads what was kept up to a step; called once, before the first evaluation.

        Raises:
            ValueError: the folder belongs to other runs, or is damaged.
        """
        self._resumed = True
        if step == 0 or not (self._folder / HISTORY).exists():
            return
        record, parameters = self._read()
        if record["run_names"] != list(self.model.runs.run_names):
            raise ValueError(
                f"{self._folder} keeps the best of the runs {record['run_names']}, and these are "
                f"{list(self.model.runs.run_names)}. Choose another MODEL_DIR."
            )
        lost = [best > step for best in record["best_step"]]
        if any(lost):
            # The parameters of an earlier best step were overwritten by these.
            logging.warning(
                "%s keeps parameters of step %d; the run goes on from step %d and selects anew.",
                self._folder,
                max(record["best_step"]),
                step,
            )
        if all(lost):
            return
        self.history = {
            int(found): [None if gone else s for gone, s in zip(lost, scores, strict=True)]
            for found, scores in record["history"].items()
            if int(found) <= step
        }
        self.best_step = [
            -1 if gone else best for gone, best in zip(lost, record["best_step"], strict=True)
        ]
        runs = self.model.runs
        gone = {
            run for group in np.flatnonzero(lost).tolist() for run in runs.names_of_group(group)
        }
        self.scores = {run: found for run, found in record["scores"].items() if run not in gone}
        self.trainable = unflatten(load(parameters))

    def run(self, train_state: Any, metrics_by_task: Scores) -> bool:
        """Records an evaluation; True once the patience with every group is over."""
        step = int(train_state.step)
        if not self._resumed:
            self.resume(step)  # under T5X, which does not call it
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
                if improved[group]
            }
        if jax.process_index() == 0:
            self._write(params_changed=any(improved))
        return all(self.over)

    def group_scores(
        self, metrics_by_task: Scores, closed: Sequence[bool] = ()
    ) -> list[float | None]:
        """Each group's score [G]; None for groups that are `closed`, whose scores are not read.

        Raises:
            ValueError: a run was not evaluated, or has no such metric.
        """
        runs = self.model.runs
        totals: list[list[float]] = [[] for _ in range(runs.num_groups)]
        for row, run in enumerate(runs.run_names):
            if any(closed) and closed[runs.group_of_row[row]]:
                continue
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
        return [sum(scores) / len(scores) if scores else None for scores in totals]

    def best_group_scores(self) -> list[float]:
        """Each group's best score [G]; NaN where it was not evaluated."""
        return [self.best_score(group) for group in range(len(self.best_step))]

    def best_score(self, group: int) -> float:
        """A group's best score; NaN where it was not evaluated."""
        step = self.best_step[group]
        score = self.history[step][group] if step >= 0 else None
        return math.nan if score is None else score

    @property
    def over(self) -> list[bool]:
        """The groups [G] with which patience is at its end."""
        return self._over()

    def _over(self, before: int | float = math.inf) -> list[bool]:
        """The same, by the evaluations of earlier steps alone."""
        if self.patience is None:
            return [False] * len(self.best_step)
        found = []
        patience = np.broadcast_to(self.patience, len(self.best_step)).tolist()
        for group, best in enumerate(self.best_step):
            seen = self._seen(group, before)
            waited = len([step for step in seen if step > best])
            found.append(len(seen) >= self.min_evaluations and waited >= patience[group])
        return found

    def _seen(self, group: int, before: int | float = math.inf) -> list[int]:
        """The steps at which a group was evaluated."""
        found = self.history.items()
        return [step for step, scores in found if scores[group] is not None and step < before]

    def _closed(self, train_state: Any, step: int) -> list[bool]:
        """Which groups an evaluation at a step has nothing to say about."""
        over = self._over(before=step)  # one that is repeated counts as the first time
        ended = np.asarray(getattr(train_state, "ended", [-1] * len(over)))
        failed = np.asarray(getattr(train_state, "failed", [False] * len(over)))
        after = [
            end >= 0 and any(seen >= end for seen in self._seen(group, before=step))
            for group, end in enumerate(ended)
        ]
        return [bool(any(reasons)) for reasons in zip(over, failed, after, strict=True)]

    def _better(self, new: float, old: float | None) -> bool:
        assert old is not None  # of the step that was the best so far
        if math.isnan(old):
            return not math.isnan(new)
        return new > old if self.mode == "max" else new < old

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
        """Two files that change together: the history first says what follows, beside what was, so
        that whichever parameters a reader meets, it meets their record too."""
        self._folder.mkdir(parents=True, exist_ok=True)
        history = self._folder / HISTORY
        record = {
            "run_names": list(self.model.runs.run_names),
            "best_step": self.best_step,
            "scores": self.scores,
            "history": self.history,
        }
        if params_changed:
            assert self.trainable is not None
            leaves = {k: np.ascontiguousarray(v) for k, v in flatten(self.trainable).items()}
            parameters = save(leaves)
            self._digest = hashlib.sha256(parameters).hexdigest()
            if self._written is not None:
                following = {**record, "trainable_sha256": self._digest}
                write_atomic(history, json.dumps({**self._written, "next": following}))
            write_atomic(self._folder / PARAMETERS, parameters)
        self._written = {**record, "trainable_sha256": self._digest}
        write_atomic(history, json.dumps(self._written))

    def _read(self) -> tuple[dict[str, Any], bytes]:
        """The record of what is kept, and the parameters.

        Raises:
            ValueError: they are not those that were written.
        """
        path = self._folder / PARAMETERS
        advice = (
            f"Remove {self._folder} and start again: the run goes on from its checkpoint and "
            "selects its best step among the evaluations that follow. Or copy the folder back from "
            "where it is whole."
        )
        try:
            record = json.loads((self._folder / HISTORY).read_text())
            parameters = path.read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._folder} cannot be read ({error}). {advice}") from error
        found = hashlib.sha256(parameters).hexdigest()
        expected = record.get("trainable_sha256", found)  # earlier versions wrote none
        following = record.pop("next", None)
        if found != expected and following and following["trainable_sha256"] == found:
            record = following  # the run was killed between the two files
        elif found != expected:
            raise ValueError(
                f"{path} was changed after it was written: its sha256 is {found}, and {HISTORY} "
                f"has {expected}. {advice}"
            )
        self._written, self._digest = record, found
        return record, parameters


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
