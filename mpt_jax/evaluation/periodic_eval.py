"""What is measured between training steps, and the compiled functions that measure it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mpt_jax.core.shapes import Params
from mpt_jax.evaluation import evaluator, metric_writers
from mpt_jax.training import selection
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.trainer import Trainer

EVAL_MODES = ("TRAIN_EVAL", "INFER_EVAL")


def on_device(
    function: Callable[..., Any], partitioner: PjitPartitioner
) -> Callable[[Params, Mapping[str, np.ndarray]], Any]:
    """A compiled `function(params, batch)` of this host's rows; NumPy arrays of all hosts' rows."""
    compiled = jax.jit(function)

    def run(params: Params, batch: Mapping[str, np.ndarray]) -> Any:
        with partitioner.activate():
            found = compiled(params, partitioner.shard_batch(batch))
        return multihost_utils.process_allgather(found, tiled=True)

    return run


@dataclasses.dataclass
class PeriodicEvaluator:
    """Everything that is measured between steps.

    Attributes:
        trainer: whose state is measured.
        writers: where scalars go.
        losses: task or mixture -> its batches; None for no training evaluation.
        inference: decodes and scores; None for none.
        actions: what may follow, by mode.
        scores: of each run, from the last evaluation.
        last_step: the step of the last evaluation.
    """

    trainer: Trainer
    writers: metric_writers.Writers
    losses: Mapping[str, Callable[[], Iterable[Mapping[str, np.ndarray]]]] | None
    inference: evaluator.InferenceEvaluator | None
    actions: Mapping[str, Sequence[selection.Action]]
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    last_step: int = -1

    def __post_init__(self):
        unknown = sorted(set(self.actions) - set(EVAL_MODES))
        if unknown:
            raise ValueError(
                f"actions are keyed by {EVAL_MODES}, got {unknown}. (T5X's TRAIN is not offered.)"
            )
        for mode, data in zip(EVAL_MODES, (self.losses, self.inference), strict=True):
            if self.actions.get(mode) and not data:
                raise ValueError(
                    f"The actions {self.actions[mode]} would never run: nothing is evaluated for "
                    f"{mode}. Give its data set, or leave the actions out."
                )
        self._predict = on_device(self.trainer.model.predict_batch, self.trainer.partitioner)
        self._score = on_device(self.trainer.model.score_batch, self.trainer.partitioner)

    @property
    def _selecting(self) -> selection.SelectBest | None:
        found = (a for many in self.actions.values() for a in many)
        return next((a for a in found if isinstance(a, selection.SelectBest)), None)

    @property
    def best(self) -> selection.SelectBest | None:
        """The action that keeps the best parameters, once it keeps any."""
        found = self._selecting
        return None if found is None or found.trainable is None else found

    def resume(self) -> None:
        """Tells the action that keeps the best parameters at which step the run goes on."""
        if self._selecting is not None:
            self._selecting.resume(self.trainer.step)

    def run(self) -> bool:
        """Evaluates the current state, and ends the training of groups that patience is at its end
        with; True if an action wants all training to end, or no group is left that trains."""
        self.last_step = step = self.trainer.step
        stop = False
        if self.losses:
            found = {name: self.trainer.evaluate(make()) for name, make in self.losses.items()}
            for name, scalars in found.items():
                self.writers.write(f"training_eval/{name}", step, scalars)
            stop |= self._act("TRAIN_EVAL", found)
        if self.inference:
            params = self.trainer.state.params
            predict = functools.partial(self._predict, params)
            score = functools.partial(self._score, params)
            self.scores = self.inference.evaluate(predict, score, step)
            for name, scalars in self.scores.items():
                logging.info(
                    "step %d  %s  %s",
                    step,
                    name,
                    {k: round(float(v), 4) for k, v in scalars.items()},
                )
            stop |= self._act("INFER_EVAL", self.scores)
        if self._selecting is not None:
            self.trainer.stop_groups(self._selecting.over)
        return stop or not self.trainer.active.any()

    def _act(self, mode: str, scores: selection.Scores) -> bool:
        actions = self.actions.get(mode, ())
        return any([action.run(self.trainer.state, scores) for action in actions])
