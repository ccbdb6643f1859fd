"""Row-wise optimizer: AdamW or another rule, with a learning rate per label and group.

The first axis of a prompt method's parameters usually counts rows: groups [G] or bank rows [K], as
given by the method's `axes`. Every row is updated independently, with separate moments, step count
and learning rate. Gradients are clipped separately for each group. A job of G independent runs
therefore gives the same results as G jobs. A label selects only a learning rate. The optimizer
receives only trainable parameters: frozen parameters have no gradient, no moments and no update.

A task without examples in a batch is `absent`: the gradients of its rows are exactly zero.
`absent_tasks='dense'` still applies moments and decay to its rows, as torch's optimizers do;
`'hold'` keeps their values, moments and step counts until the task is in a batch again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpt_jax.core.runs import Runs
from mpt_jax.core.shapes import Array, Bool, Params
from mpt_jax.core.tree import Rules, flatten, label_tree, path_name
from mpt_jax.training.row_transforms import Rows, _pick_rows, by_row, clip_by_group_norm, row_groups
from mpt_jax.training.schedules import EpochCosine, PerGroup, Schedule

# Label for step counters: not trained; incremented once per step.
STEP_COUNTER = "clock"


@dataclasses.dataclass(frozen=True)
class PromptOptimizer:
    """AdamW, or another rule, for the parameters that a label table makes trainable.

    Attributes:
        learning_rates: the schedule of every trainable label except `STEP_COUNTER`.
        weight_decay: the decoupled weight decay.
        weight_decay_times_rate: whether the decay is multiplied by the learning rate, as in AdamW.
            T5X's Adafactor subtracts the same part in every step.
        clip_norm: the largest norm of a group's gradient over all its parameters: one number, or
            one per group. None disables clipping.
        absent_tasks: `'dense'` or `'hold'`; see the module docstring.
        b1, b2, eps: Adam's hyperparameters.
        rule: a function that returns the optax transformation to use in place of Adam, such as
            `adafactor`. It is called without arguments. The transformation is applied to each row,
            before weight decay and learning rate. None uses Adam.

    Raises:
        ValueError: `absent_tasks` is unknown, or a hyperparameter of Adam is set together with
            `rule`.
    """

    learning_rates: Mapping[str, Schedule | EpochCosine]
    weight_decay: float = 1e-5
    weight_decay_times_rate: bool = True
    clip_norm: PerGroup | None = 1.0
    absent_tasks: str = "dense"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    rule: Callable[[], optax.GradientTransformation] | None = None
    # Set by `bind`, from the model.
    labels: Rules | None = None
    runs: Runs | None = None
    rows: Rows | None = None
    schedule_steps: int = 0

    def __post_init__(self):
        if self.absent_tasks not in ("dense", "hold"):
            raise ValueError(
                "PromptOptimizer.absent_tasks must be 'dense' or 'hold', got "
                f"{self.absent_tasks!r}."
            )
        changed = [f.name for f in dataclasses.fields(self) if f.name in ("b1", "b2", "eps")]
        changed = [name for name in changed if getattr(self, name) != getattr(type(self), name)]
        if self.rule is not None and changed:
            name = changed[0]
            raise ValueError(
                f"PromptOptimizer.{name} = {getattr(self, name)} would have no effect: it is a "
                "hyperparameter of Adam, which PromptOptimizer.rule replaces. Leave "
                f"{name} at its default, {getattr(type(self), name)}, or set rule to None."
            )

    def bind(
        self, labels: Rules, runs: Runs, rows: Rows, schedule_steps: int = 0
    ) -> PromptOptimizer:
        """Returns a copy of this optimizer that is bound to a model.

        Args:
            labels: the model's label table.
            runs: the runs of the job, with the group of each bank row.
            rows: what the rows of each parameter count (see `Rows`).
            schedule_steps: the length of the prompt method's own schedule in steps; 0 if it has
                none.

        Raises:
            ValueError: a setting with several entries does not have one entry per group.
        """
        for name, value in (("clip_norm", self.clip_norm), *self._schedule_fields()):
            if np.ndim(value) and len(value) != runs.num_groups:  # pyright: ignore
                raise ValueError(
                    f"PromptOptimizer.{name} has {len(value)} entries, but the job has "  # pyright: ignore
                    f"{runs.num_groups} groups. Set it to one number, or to one number per group. "
                    "Settings per run, such as TASK_STEPS, need GROUPS = 'independent'."
                )
        return dataclasses.replace(
            self, labels=tuple(labels), runs=runs, rows=dict(rows), schedule_steps=schedule_steps
        )

    def init(self, trainable: Params) -> Any:
        """Returns the optimizer state of the trainable parameters."""
        return self._transformation(trainable).init(trainable)

    def update(self, grads: Params, state: Any, trainable: Params) -> tuple[Any, Any]:
        """Returns the updates to add to the trainable parameters, and the next state.

        Raises:
            ValueError: the prompt method's own schedule is longer than a learning-rate schedule, or
                a trainable label has no learning rate.
        """
        ends = [schedule.total_steps for schedule in self.learning_rates.values()]
        shortest = min(
            (np.min(end) for end in ends if end is not None), default=self.schedule_steps
        )
        check_annealing(self.schedule_steps, int(shortest))
        return self._transformation(trainable).update(grads, state, trainable)

    def select(
        self, stepped: Bool[Array, " G"], new: tuple[Params, Any], old: tuple[Params, Any]
    ) -> tuple[Params, Any]:
        """Returns (trainable parameters, optimizer state), with the values of `new` for groups that
        took the step and exactly the values of `old` for all other groups.

        Args:
            stepped: whether each group took the step.
            new: (trainable parameters, optimizer state) after the step.
            old: (trainable parameters, optimizer state) before the step.
        """
        assert self.runs is not None and self.rows is not None  # bound, or there is no state
        rows, runs = self.rows, self.runs
        groups = self._groups_of_parts(old[0])

        def of_parameter(path: tuple, new: Array, old: Array) -> Array:
            return _pick_rows(stepped, row_groups(path_name(path), rows, runs), new, old)

        clip, parts = new[1]
        before = old[1][1].inner_states  # by name: compiled functions return dicts sorted
        inner = {
            part: jax.tree.map(
                functools.partial(_pick_rows, stepped, groups[part]), state, before[part]
            )
            for part, state in parts.inner_states.items()
        }
        trainable = jax.tree_util.tree_map_with_path(of_parameter, new[0], old[0])
        return trainable, (clip, parts._replace(inner_states=inner))

    def is_over(self, state: Any, trainable: Params) -> Bool[Array, " G"]:
        """Returns whether each group has reached the end of all its learning-rate schedules.

        False for all groups if there is only one, if a schedule has no `total_steps`, or if every
        `total_steps` is a single number. The progress of a group is the largest step count of its
        rows.

        Args:
            state: the optimizer state after a step.
            trainable: the trainable parameters.
        """
        count = self.runs.num_groups if self.runs else 1
        totals = [schedule.total_steps for schedule in self.learning_rates.values()]
        ends = [total for total in totals if total is not None]
        if count == 1 or len(ends) < len(totals) or not any(np.ndim(end) for end in ends):
            return jnp.zeros(count, bool)
        limits = np.max([np.broadcast_to(end, count) for end in ends], axis=0)
        taken = jnp.zeros(count, jnp.int32)
        for part, groups in self._groups_of_parts(trainable).items():
            steps = state[1].inner_states[part].inner_state.steps
            taken = jnp.maximum(taken, jax.ops.segment_max(steps, np.asarray(groups), count))
        return taken >= limits

    def current_learning_rates(self, step: int) -> dict[str, float]:
        """Returns each label's learning rate at a step, averaged over groups, for logs."""
        groups = jnp.arange(self.runs.num_groups if self.runs else 1)
        return {
            label: float(jnp.mean(schedule(jnp.full(groups.shape, step), groups)))
            for label, schedule in self.learning_rates.items()
        }

    def _groups_of_parts(self, trainable: Params) -> dict[str, tuple[int, ...] | None]:
        """Returns the group of each row, by part (parameters that are updated together)."""
        assert self.labels is not None and self.runs is not None and self.rows is not None
        parts = _parts(flatten(label_tree(trainable, self.labels)), self.rows)
        return {part: row_groups(name, self.rows, self.runs) for name, part in parts.items()}

    def _schedule_fields(self) -> list[tuple[str, Any]]:
        return [
            (f"learning_rates[{label!r}].{field.name}", getattr(schedule, field.name))
            for label, schedule in self.learning_rates.items()
            for field in dataclasses.fields(schedule)
            if field.name != "decay"
        ]

    def _transformation(self, trainable: Params) -> optax.GradientTransformation:
        if self.labels is None or self.runs is None or self.rows is None:
            raise ValueError(
                "This optimizer is not bound to a model. Call bind(labels, runs, rows) first."
            )
        labels = flatten(label_tree(trainable, self.labels))
        missing = sorted(set(labels.values()) - set(self.learning_rates) - {STEP_COUNTER})
        if missing:
            raise ValueError(
                f"No learning rate for the labels {', '.join(missing)}: "
                f"PromptOptimizer.learning_rates has {', '.join(sorted(self.learning_rates))}. Add "
                "a schedule for each missing label."
            )
        rule = self.rule() if self.rule else optax.scale_by_adam(self.b1, self.b2, self.eps)
        scaled = self.weight_decay if self.weight_decay_times_rate else 0.0
        inner = optax.chain(rule, optax.add_decayed_weights(scaled))
        parts = _parts(labels, self.rows)
        rules: dict[Hashable, optax.GradientTransformation] = {
            part: self._rule(inner, labels[name], row_groups(name, self.rows, self.runs))
            for name, part in parts.items()
        }
        clip = clip_by_group_norm(self.clip_norm, self.rows, self.runs)
        tree = jax.tree.unflatten(jax.tree.structure(trainable), list(parts.values()))
        return optax.chain(clip, optax.partition(rules, tree))

    def _rule(
        self, inner: optax.GradientTransformation, label: str, groups: tuple[int, ...] | None
    ) -> optax.GradientTransformation:
        if label == STEP_COUNTER:
            tick = optax.stateless(lambda grads, _: jax.tree.map(jnp.ones_like, grads))
            return by_row(tick, lambda steps, _: jnp.full(steps.shape, -1.0), groups, hold=False)
        decay = 0.0 if self.weight_decay_times_rate else self.weight_decay
        hold = self.absent_tasks == "hold"
        return by_row(inner, self.learning_rates[label], groups, hold, decay)


def check_annealing(schedule_steps: int, total_steps: int) -> None:
    """Raises ValueError if the prompt method's own schedule is longer than a run."""
    if schedule_steps > total_steps:
        raise ValueError(
            f"The prompt method anneals over {schedule_steps} steps, but a run has only "
            f"{total_steps}, so training would end first. Shorten the annealing (ANNEALING_STEPS), "
            "or train longer (TRAIN_STEPS)."
        )


def adafactor() -> optax.GradientTransformation:
    """Adafactor as used for prompt tuning (Lester et al. 2021): unfactored second moments, decay
    0.8, no scaling by parameter size, updates clipped at RMS 1.

    T5X's weight decay does not depend on the learning rate: set
    `PromptOptimizer.weight_decay_times_rate` to False.
    """
    return optax.chain(
        optax.scale_by_factored_rms(factored=False, decay_rate=0.8),
        optax.clip_by_block_rms(1.0),
    )


def sgd(momentum: float = 0.9, weight_decay: float = 5e-4) -> optax.GradientTransformation:
    """Stochastic gradient descent as in the released code of CoOp: momentum without dampening, and
    weight decay that is added to the gradient, before the momentum.

    Set `PromptOptimizer.weight_decay` to 0, which would decay again.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(momentum))


def _parts(labels: Mapping[str, str], rows: Rows) -> dict[str, str]:
    """Returns the part of each parameter.

    The parameters of a part are updated together. They have the same label, and their rows count
    the same thing: groups, bank rows, or nothing.
    """
    kinds: dict[str, set[str | None]] = {}
    for name, label in labels.items():
        kinds.setdefault(label, set()).add(rows.get(name))
    return {
        name: label if len(kinds[label]) == 1 else f"{label}_by_{rows.get(name, 'none')}"
        for name, label in labels.items()
    }
