"""T5X's protocol for actions that run after an evaluation, and its two built-in actions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from mpt_jax.core.runs import look_up

Scores = Mapping[str, Mapping[str, float]]


@runtime_checkable
class Action(Protocol):
    """An action that runs after each evaluation, as in T5X."""

    def run(self, train_state: Any, metrics_by_task: Scores) -> bool:
        """Reads the scores of each run. Returns True to stop training."""
        ...


@dataclasses.dataclass
class EarlyStoppingAction:
    """Stops training when a task's metric has stopped improving. The fields are those of T5X.

    Attributes:
        metric: the metric to watch, as (name of a task or run, name of a metric).
        mode: `'max'` if higher values are better, `'min'` if lower values are.
        patience: the number of consecutive evaluations without improvement before training stops.
        atol: the absolute gain that an improvement must exceed.
        rtol: the gain that an improvement must exceed, as a fraction of the best value; added to
            `atol`.

    Raises:
        ValueError: the mode is unknown.
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
        """Returns True once patience has run out.

        Raises:
            ValueError: the task was not evaluated, or does not have the metric.
        """
        task, metric = self.metric
        value = float(_watched(metrics_by_task, task, metric, "EarlyStoppingAction"))
        if math.isnan(value):  # never an improvement, never the best
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
    """Stops training when a task's metric is not finite. The fields are those of T5X.

    Independently of this action, `Trainer` checks that the values of every step are finite.

    Attributes:
        task: the name of the task or run to watch.
        metric: the name of its metric.
    """

    task: str
    metric: str = "loss"

    def run(self, train_state: Any, metrics_by_task: Scores) -> bool:
        """Returns True if the metric is NaN or infinite.

        Raises:
            ValueError: the task was not evaluated, or does not have the metric.
        """
        value = _watched(metrics_by_task, self.task, self.metric, "TerminateOnNanAction")
        return not math.isfinite(value)


def _watched(metrics_by_task: Scores, task: str, metric: str, action: str) -> float:
    """Returns a metric of a task. `action` is the name of the action, for errors."""
    metrics = look_up(f"evaluated task in {action}:", task, metrics_by_task)
    return look_up(f"metric of {task} in {action}:", metric, metrics)
