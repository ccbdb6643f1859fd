"""The steps, pure functions, and the object that compiles them.

A step differentiates what learns and nothing else, so no gradient or moment the size of the
backbone can exist. Microbatches are added up as sums and divided once by weights of the whole
batch, so their number changes rounding only.

A group whose step would leave a value that is not finite does not take it: its parameters and
moments stay as they were, it has failed, and the others go on as if it had not been there. Where
no group is left that has not failed, the step is not taken at all, and the host stops the job when
it reads the metrics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mpt_jax.core.shapes import Array, Batch, Key
from mpt_jax.models import metrics
from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
from mpt_jax.prompts.row_ops import rows_split_over
from mpt_jax.training import oom, sparse_step
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.row_compaction import RowCompactor
from mpt_jax.training.state import TrainState
from mpt_jax.training.teacher_cache import TeacherCache
from mpt_jax.training.train_step import eval_step, train_step


class NonFiniteLoss(RuntimeError):
    """Of every group a loss or gradient was NaN or infinite; the state before that is intact."""


# --- Pure steps ----------------------------------------------------------------------------------


def _select(chosen: Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` where `chosen`, else `old`; what is frozen is the same in both."""
    pick = functools.partial(jax.tree.map, lambda a, b: jnp.where(chosen, a, b))
    names = ("step", "trainable", "opt_state", "ended", "failed")
    return old.replace(**{name: pick(getattr(new, name), getattr(old, name)) for name in names})


# --- The compiled trainer ------------------------------------------------------------------------


def _step_of_number(
    model: PromptedEncoderDecoder,
    num_microbatches: int,
    state: TrainState,
    batch: Batch,
    rng: Key,
    number: Array,
) -> tuple[TrainState, metrics.StepMetrics]:
    """The step, unless one before it was not taken: the host sends steps before it reads how they
    went, and those must not go on from a state that lacks one."""

    def step(
        model: PromptedEncoderDecoder, state: TrainState, batch: Batch
    ) -> tuple[TrainState, metrics.StepMetrics]:
        new, found = train_step(model, num_microbatches, state, batch, rng)
        return _select(state.step == number, new, state), found

    return sparse_step.step_of_batch(step, model, state, batch)


def _places(
    model: PromptedEncoderDecoder, partitioner: PjitPartitioner, num_microbatches: int
) -> RowCompactor:
    shards = math.prod(partitioner.mesh.devices.shape[:-1])
    local = shards // jax.process_count()
    return RowCompactor(model.runs, shards, local * jax.process_index(), local, num_microbatches)


class Trainer:
    """Compiles the steps over a mesh and runs them. Its gin fields are T5X's.

    Args:
        model: what is trained.
        state: of the first step.
        partitioner: mesh and rules.
        rng: the run's key.
        num_microbatches: parts of a batch that are differentiated one after another.
        learning_rate_fn: only logged, as `learning_rate`; the optimizer's own schedules act.
        rows_by_run: whether every batch holds the runs one after the other, each with as many
            rows (`sampling.EqualQuotas`, not packed). Rows of runs that have ended are then left
            out of batches, from the next `compact_batches` on; and of a state made with the same
            argument each shard of the mesh holds its own runs.
        teacher_cache: keeps what teachers say of examples that come again; None computes it anew
            in every step.
    """

    def __init__(
        self,
        model: PromptedEncoderDecoder,
        state: TrainState,
        partitioner: PjitPartitioner,
        rng: Key,
        num_microbatches: int | None = None,
        learning_rate_fn: Callable[[Array], Any] | None = None,
        rows_by_run: bool = False,
        teacher_cache: TeacherCache | None = None,
    ):
        self.model = model
        self.state = state
        self.partitioner = partitioner
        self.learning_rate_fn = learning_rate_fn
        self._rng = rng
        self._totals: metrics.StepMetrics | None = None
        parts = self.num_microbatches = num_microbatches or 1
        self._places = _places(model, partitioner, parts) if rows_by_run else None
        self._teachers = None
        if teacher_cache is not None:
            self._teachers = teacher_cache.open(model, state, partitioner, parts, rows_by_run)
        step: Callable[..., Any] = functools.partial(_step_of_number, model, parts)
        if rows_by_run and partitioner.splits_runs(model.runs):
            step = rows_split_over(partitioner.mesh.axis_names[:-1])(step)
        # A layout can be written in several ways (an axis of one device, say). Unless the state
        # goes out as it came in, the second step has another signature and is compiled again.
        layout = jax.tree.map(lambda x: getattr(x, "sharding", None), state)
        self._train_step = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
        self._eval_step = jax.jit(functools.partial(eval_step, model))
        self._merge = jax.jit(metrics.merge)
        # Counts steps dispatched; the device's own count lags behind and stops at a bad loss.
        self.step = int(state.step)
        self.ended, self.failed = np.asarray(state.ended), np.asarray(state.failed)
        # The groups whose rows are in batches.
        self._groups_in_batch = np.ones(model.runs.num_groups, bool)
        self._largest: Mapping[str, np.ndarray] = {}  # batch so far

    def train(self, batch: Mapping[str, np.ndarray]) -> None:
        """Dispatches one step; metrics gather on the device until `read_metrics`.

        Raises:
            OutOfMemory: the step does not fit a device.
        """
        self._largest = oom.larger_batch(self._largest, batch)
        with oom.explain_oom(self, self._largest):
            self._dispatch(batch)

    def wait(self) -> None:
        """Waits for the steps dispatched; raises as `train` does."""
        with oom.explain_oom(self, self._largest):
            jax.block_until_ready(self.state.trainable)

    def _dispatch(self, batch: Mapping[str, np.ndarray]) -> None:
        if self._places is not None:
            batch = self._places.pack(batch, self._groups_in_batch)
        with self.partitioner.activate():
            if self._teachers is not None:
                batch = self._teachers.add(self.state.frozen, batch)
            rows = self.partitioner.shard_batch(batch)
            self.state, found = self._train_step(self.state, rows, self._rng, np.int32(self.step))
            self._totals = found if self._totals is None else self._merge(self._totals, found)
        self.step += 1

    @property
    def active(self) -> np.ndarray:
        """Which groups [G] train, as far as has been read: what a step found comes with
        `read_metrics`. Bool."""
        return self.ended < 0

    def stop_groups(self, over: Sequence[bool]) -> None:
        """Ends the training of some groups [G], which have not failed; they keep what they learned.
        Those that have ended stay as they are."""
        self._read_run_status()
        ended = np.where(np.asarray(over) & (self.ended < 0), self.step, self.ended)
        if (ended != self.ended).any():
            self.ended = ended.astype(np.int32)
            placed = jax.device_put(self.ended, self.state.ended.sharding)
            self.state = self.state.replace(ended=placed)

    def compact_batches(self) -> None:
        """Leaves the rows of groups that have ended, as far as is known, out of batches from now
        on. Which rows are in a batch changes rounding, and with dropout the masks that are drawn,
        so whoever resumes exactly must call this at the same steps."""
        if (
            self._places is None
            or (self._groups_in_batch == self.active).all()
            or not self.active.any()
        ):
            return
        self._groups_in_batch = self.active
        logging.info(
            "%d of %d runs train from step %d on; batches hold their rows alone.",
            sum(self._groups_in_batch[group] for group in self.model.runs.group_of_row),
            self.model.runs.num_rows,
            self.step,
        )

    def run_status(self) -> dict[str, Any]:
        """Which groups have ended, as far as has been read: what a checkpoint keeps beside the
        state. JSON values."""
        return {
            "ended": self.ended.tolist(),
            "failed": self.failed.tolist(),
            "placed": self._groups_in_batch.tolist(),
        }

    def load_run_status(self, standing: Mapping[str, Any]) -> None:
        """Takes up what `standing` said at the step of the state."""
        state = self.state
        self.ended = np.asarray(standing["ended"], np.int32)
        self.failed = np.asarray(standing["failed"], bool)
        self._groups_in_batch = np.asarray(standing["placed"], bool)
        self.state = state.replace(
            ended=jax.device_put(self.ended, state.ended.sharding),
            failed=jax.device_put(self.failed, state.failed.sharding),
        )

    def reactivate_extended(self, out_of_patience: Sequence[bool], total_steps: int) -> None:
        """Lets groups train again that ended without failing and would not end now, because their
        schedule or their patience was extended. They go on from their own last step, with examples
        of the job's step. The log names them; where the job has no step left, as a warning.

        Args:
            out_of_patience: of which groups [G] patience is at its end.
            total_steps: of the job.
        """
        ended = (self.ended >= 0) & ~self.failed & ~np.asarray(out_of_patience, bool)
        if not ended.any():
            return
        everywhere = self.state.ended.sharding
        is_over = jax.jit(self.model.optimizer_def.is_over, out_shardings=everywhere)
        with self.partitioner.activate():
            over = jax.device_get(is_over(self.state.opt_state, self.state.trainable))
        reopened = np.flatnonzero(ended & ~over)
        runs = [run for group in reopened.tolist() for run in self.model.runs.names_of_group(group)]
        if self.step >= total_steps and runs:
            logging.warning(
                "%s ended early and could go on by the settings of now, but the job has been "
                "trained to step %d already: for more, set TRAIN_STEPS higher.",
                ", ".join(runs),
                self.step,
            )
        elif runs:
            told = ", ".join(runs)
            logging.info("%s had ended; trained again from step %d on.", told, self.step)
            self.ended, self._groups_in_batch = self.ended.copy(), self._groups_in_batch.copy()
            self.ended[reopened], self._groups_in_batch[reopened] = -1, True
            self.state = self.state.replace(ended=jax.device_put(self.ended, everywhere))

    def lower(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The training and the evaluation step for a batch, ready to be compiled. All arrays may be
        `ShapeDtypeStruct`s that lie on devices which are not here, the state's as well."""
        with self.partitioner.activate():
            number, training = jax.ShapeDtypeStruct((), jnp.int32), batch
            if self._teachers is not None:
                training = self._teachers.shapes(self.state.frozen, batch)
            return {
                "train": self._train_step.lower(self.state, training, self._rng, number),
                "eval": self._eval_step.lower(self.state.params, batch, self.state.failed),
            }

    def read_metrics(self) -> dict[str, float]:
        """Waits for the steps dispatched and returns their mean metrics, of the groups that took
        them. Groups that have failed are named in the log.

        Raises:
            NonFiniteLoss: a step was not taken, because no group is left that has not failed;
                `state` is the one before it.
            OutOfMemory: a step did not fit a device, which may show only when its metrics are read.
        """
        with oom.explain_oom(self, self._largest):
            return self._read_metrics()

    def _read_metrics(self) -> dict[str, float]:
        if self._totals is None:
            return {}
        totals, self._totals = jax.device_get(self._totals), None
        self._read_run_status()
        found = metrics.scalars(totals, self.model.runs)
        rates = self.model.optimizer_def.current_learning_rates(self.step)
        found |= {f"learning_rate/{label}": rate for label, rate in rates.items()}
        if self._teachers is not None:
            found |= self._teachers.metrics()
        if self.learning_rate_fn is not None:
            found["learning_rate"] = float(self.learning_rate_fn(jnp.asarray(self.step)))
        return found

    def _read_run_status(self) -> None:
        """Waits for the steps dispatched; reads which groups have ended, and logs new failures."""
        state = self.state
        taken, ended, failed = jax.device_get((state.step, state.ended, state.failed))
        runs = self.model.runs
        for group in np.flatnonzero(failed & ~self.failed).tolist():
            logging.error(
                "%s failed: the loss or a gradient of step %d is not finite. What was learned by "
                "then is kept; the others go on. Its learning rate may be too high.",
                ", ".join(runs.names_of_group(group)),
                ended[group],
            )
        self.ended, self.failed = ended, failed
        if taken != self.step:
            others = " and those of all other runs failed before" if failed.any() else ""
            raise NonFiniteLoss(
                f"The loss or a gradient of step {taken} is not finite{others}; training stopped "
                f"with the state of step {taken}, which is intact. Lower the learning rate, or "
                "look at the batch of that step."
            )

    def evaluate(self, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Mean metrics over batches, of the current state and the groups that have not failed."""
        totals, params, failed = None, self.state.params, self.state.failed
        with self.partitioner.activate():
            for batch in batches:
                found = self._eval_step(params, self.partitioner.shard_batch(batch), failed)
                totals = found if totals is None else self._merge(totals, found)
        return {} if totals is None else metrics.scalars(jax.device_get(totals), self.model.runs)
