"""Periodic evaluation between training steps, and the compilation of its functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Params
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.evaluation import evaluator, metric_writers
from mpt_jax.training import partitioning, selection
from mpt_jax.training.image_cache import without_files
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.trainer import Trainer

EVAL_MODES = ("TRAIN_EVAL", "INFER_EVAL")
FEW_EXAMPLES = 100  # to select a step on


def on_device(
    function: Callable[..., Any],
    partitioner: PjitPartitioner,
    prepare: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] = without_files,
) -> Callable[[Params, Mapping[str, np.ndarray]], Any]:
    """Compiles `function(params, batch)`. The compiled function takes this host's rows of a batch
    and returns the outputs for the rows of all hosts, as NumPy arrays. `prepare` is called with
    these rows first."""
    compiled = jax.jit(function)

    def run(params: Params, batch: Mapping[str, np.ndarray]) -> Any:
        with partitioner.activate():
            outputs = compiled(params, partitioner.shard_batch(prepare(batch)))
        return multihost_utils.process_allgather(outputs, tiled=True)

    return run


@dataclasses.dataclass
class PeriodicEvaluator:
    """Evaluates losses and metrics between training steps.

    Attributes:
        trainer: the trainer whose state is evaluated.
        writers: the writers of the scalars.
        losses: {task or mixture: function that returns its batches}; None to compute no losses.
        inference: the evaluator that decodes and scores; None to compute no metrics.
        actions: {mode of `EVAL_MODES`: actions to run after an evaluation}.
        scores: metrics of each run. Those of a run that had ended before its last evaluation are
            not computed again, because its parameters do not change.
        last_step: the step of the last evaluation; -1 before the first.
        not_evaluated: {run: the split that it would be evaluated on, but that its task lacks}.

    Raises:
        ValueError: `actions` has an unknown mode, or a mode that is not evaluated.
    """

    trainer: Trainer
    writers: metric_writers.Writers
    losses: Mapping[str, Callable[[], Iterable[Mapping[str, np.ndarray]]]] | None
    inference: evaluator.InferenceEvaluator | None
    actions: Mapping[str, Sequence[selection.Action]]
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    last_step: int = -1
    not_evaluated: Mapping[str, str] = dataclasses.field(default_factory=dict)
    _final: frozenset[str] = frozenset()  # runs whose scores are those of their last parameters

    def __post_init__(self):
        unknown = sorted(set(self.actions) - set(EVAL_MODES))
        if unknown:
            raise ValueError(
                f"train.actions has unknown keys: {', '.join(map(str, unknown))}. Use only "
                f"{' and '.join(EVAL_MODES)} (T5X's TRAIN is not supported)."
            )
        for mode, data in zip(EVAL_MODES, (self.losses, self.inference), strict=True):
            if self.actions.get(mode) and not data:
                names = ", ".join(type(action).__name__ for action in self.actions[mode])
                cfg = f"train.{mode.lower()}_dataset_cfg"
                raise ValueError(
                    f"train.actions[{mode!r}] ({names}) would never run, because {cfg} is None. "
                    f"Bind {cfg}, or remove {mode} from train.actions."
                )
        model, prepare = self.trainer.model, self.trainer.with_image_features
        self._predict = on_device(model.predict_batch, self.trainer.partitioner, prepare)
        self._score = on_device(model.score_batch, self.trainer.partitioner, prepare)

    @property
    def selecting(self) -> selection.SelectBest | None:
        """The action that selects the best step; None if there is none."""
        actions = (action for of_mode in self.actions.values() for action in of_mode)
        return next((a for a in actions if isinstance(a, selection.SelectBest)), None)

    @property
    def best(self) -> selection.SelectBest | None:
        """The action that keeps the best parameters; None if there is none or it has kept none."""
        action = self.selecting
        return None if action is None or action.trainable is None else action

    def resume(self) -> None:
        """Restores the state of `SelectBest`, if configured, as of the trainer's step."""
        if self.selecting is not None:
            self.selecting.resume(self.trainer.step)

    def run(self) -> bool:
        """Evaluates the current state, and stops groups that have run out of patience. Returns
        True if an action stops all training, or no group is active."""
        self.last_step = step = self.trainer.step
        stop = False
        self._report_statistics(step)
        params = self.trainer.params_for_evaluation()
        if self.losses:
            losses = {
                name: self.trainer.evaluate(make(), params) for name, make in self.losses.items()
            }
            for name, scalars in losses.items():
                self.writers.write(f"training_eval/{name}", step, scalars)
            stop |= self._act("TRAIN_EVAL", losses)
        if self.inference:
            predict = functools.partial(self._predict, params)
            score = functools.partial(self._score, params)
            names = [name for name in self.inference.task_names if name not in self._final]
            found = self.inference.evaluate(predict, score, step, names) if names else {}
            self.scores = self.scores | found
            for name, scalars in found.items():
                logging.info(
                    "step %d  %s  %s",
                    step,
                    name,
                    {k: round(float(v), 4) for k, v in scalars.items()},
                )
            stop |= self._act("INFER_EVAL", self.scores)
        if self.selecting is not None:
            self.trainer.stop_groups(self.selecting.over)
        self._final = frozenset(self._ended_runs())
        return stop or not self.trainer.active.any()

    def _ended_runs(self) -> list[str]:
        """Returns the names of the runs whose parameters no longer change."""
        runs, active = self.trainer.model.runs, self.trainer.active
        rows = zip(runs.run_names, runs.group_of_row, strict=True)
        return [run for run, group in rows if not active[group]]

    def _report_statistics(self, step: int) -> None:
        """Writes and logs `PromptMethod.statistics` of the parameters."""
        model = self.trainer.model
        if model.runs.num_groups == model.runs.num_rows:  # nothing to compare within a group
            return
        params = partitioning.to_host(self.trainer.state.params.get("prompt", {}))
        if found := model.prompt.statistics(params, model.runs):
            self.writers.write("prompt", step, found)
            shown = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
            logging.info("step %d  prompts: %s", step, shown)

    def _act(self, mode: str, scores: selection.Scores) -> bool:
        actions = self.actions.get(mode, ())
        return any([action.run(self.trainer.state, scores) for action in actions])


def warn_not_evaluated(runs: Runs, not_evaluated: Mapping[str, str]) -> None:
    """Logs which runs are not evaluated, given {run: the split that its task lacks}."""
    rows = list(zip(runs.run_names, runs.group_of_row, strict=True))
    scored = {group for run, group in rows if run not in not_evaluated}
    split = next(iter(not_evaluated.values()), "")
    outcomes = {
        False: "Their prompts are those of the last step",
        True: "The other runs of their group select its best step",
    }
    for in_scored_group, outcome in outcomes.items():
        names = [r for r, g in rows if r in not_evaluated and (g in scored) == in_scored_group]
        if names:
            logging.warning(
                "These runs are not evaluated, because their tasks have no %r split: %s. %s. To "
                "evaluate them and select the best step, add this split to the tasks.",
                *(split, abbreviate(names), outcome),
            )


def warn_of_small_sets(num_examples: Mapping[str, int], split: str) -> None:
    """Logs which runs select their best step on fewer than `FEW_EXAMPLES`, given the number of
    evaluated examples of each run."""
    small = [f"{run} ({n})" for run, n in num_examples.items() if n < FEW_EXAMPLES]
    if small:
        logging.warning(
            "The best step is selected on fewer than %d examples of the %r split, of which each is "
            "more than one percent: %s. To keep the last step instead, set "
            "train_script.train.actions = {}.",
            *(FEW_EXAMPLES, split, abbreviate(small)),
        )


def check_actions(
    actions: Mapping[str, Sequence[selection.Action]],
    **configs: tuple[DatasetConfig | None, DatasetConfig | None],
) -> None:
    """Raises ValueError if a mode has actions, but no task has the split that it evaluates.

    Args:
        actions: the actions of each mode.
        configs: for each mode, the settings of its dataset, and these settings after
            `datasets.with_split`.
    """
    for mode, (asked, found) in configs.items():
        if asked and found is None and actions.get(mode):
            names = ", ".join(type(action).__name__ for action in actions[mode])
            raise ValueError(
                f"train.actions[{mode!r}] ({names}) would never run, because no task has a "
                f"{asked.split!r} split. Add this split to a task, or remove {mode} from "
                "train.actions."
            )
