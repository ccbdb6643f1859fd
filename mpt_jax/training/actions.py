"""T5X's protocol of actions after an evaluation, and T5X's own actions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from mpt_jax.core.runs import look_up

Scores = Mapping[str, Mapping[str, float]]


@runtime_checkable
class Action(Protocol):
    """What may happen after an evaluation. T5X's protocol."""

    def run(self, train_state: Any, metrics_by_task: Scores) -> bool:
        """Looks at the scores of each run; True ends training."""
        ...


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
        metrics = look_up("evaluated task", task, metrics_by_task)
        value = float(look_up(f"metric of {task}", metric, metrics))
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
        metrics = look_up("evaluated task", self.task, metrics_by_task)
        return not math.isfinite(look_up(f"metric of {self.task}", self.metric, metrics))
