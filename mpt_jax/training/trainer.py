"""Trainer: compiles the train and eval steps over a mesh and runs them.

A step differentiates only the trainable parameters, so no gradient or moment the size of the
backbone can exist. Gradients of microbatches are summed, with the normalizers of the whole batch,
so the number of microbatches changes only rounding.

A group whose step would produce a value that is not finite does not take it: the group has failed
and keeps its parameters and moments, and the other groups continue unaffected. If every group has
failed, the step is not taken at all, and the host stops the job when it reads the metrics.
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

from mpt_jax.core.shapes import Array, Batch, Key, Params
from mpt_jax.models import metrics
from mpt_jax.models.model import Model
from mpt_jax.prompts.row_ops import rows_split_over
from mpt_jax.training import oom, sparse_step
from mpt_jax.training.image_cache import ImageCache, without_files
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.row_compaction import RowCompactor
from mpt_jax.training.state import TrainState
from mpt_jax.training.teacher_cache import TeacherCache
from mpt_jax.training.train_step import eval_step, term_gradient_norms, train_step


class NonFiniteLoss(RuntimeError):
    """Every group has failed with a NaN or infinite value. The state before the last failing step
    is intact."""


# --- The guarded step ----------------------------------------------------------------------------


def _select(use_new: Array, new: TrainState, old: TrainState) -> TrainState:
    """Returns `new` if `use_new`, else `old`. Frozen parameters are the same in both."""
    pick = functools.partial(jax.tree.map, lambda a, b: jnp.where(use_new, a, b))
    names = ("step", "trainable", "opt_state", "ended", "failed")
    return old.replace(**{name: pick(getattr(new, name), getattr(old, name)) for name in names})


# --- The compiled trainer ------------------------------------------------------------------------


def _guarded_step(
    model: Model,
    num_microbatches: int,
    state: TrainState,
    batch: Batch,
    rng: Key,
    number: Array,
) -> tuple[TrainState, metrics.StepMetrics]:
    """Takes step `number`, or returns the state unchanged if an earlier step was not taken.

    The host dispatches steps before it has read the results of earlier steps, so a step may be
    dispatched after the job has failed.
    """

    def step(
        model: Model, state: TrainState, batch: Batch
    ) -> tuple[TrainState, metrics.StepMetrics]:
        new, step_metrics = train_step(model, num_microbatches, state, batch, rng)
        return _select(state.step == number, new, state), step_metrics

    return sparse_step.step_of_batch(step, model, state, batch)


def _make_compactor(
    model: Model, partitioner: PjitPartitioner, num_microbatches: int
) -> RowCompactor:
    """Returns the row compactor of this process."""
    shards = math.prod(partitioner.mesh.devices.shape[:-1])
    local = shards // jax.process_count()
    return RowCompactor(model.runs, shards, local * jax.process_index(), local, num_microbatches)


class Trainer:
    """Compiles the steps over a mesh and runs them. The gin parameters are those of T5X.

    Args:
        model: the model to train.
        state: the initial state.
        partitioner: the mesh and the logical-axis rules.
        rng: the job's random key.
        num_microbatches: the number of parts that a batch is split into; their gradients are
            computed one after another, to save memory. None means 1.
        learning_rate_fn: a schedule that is only logged, as `learning_rate`. The optimizer uses the
            schedules in its own settings.
        rows_by_run: whether every batch has the same number of rows for each run, ordered by run
            (`sampling.EqualQuotas`, not packed). If so, `compact_batches` leaves out the rows of
            finished runs. If the state was also created with `rows_by_run`, each shard of the mesh
            holds only the bank rows of its own runs.
        teacher_cache: the settings of the cache for teacher outputs of examples that are seen
            again; None recomputes teacher outputs in every step.
        image_cache: the settings of the cache for features of images that are seen again; None
            encodes images in every step.
    """

    def __init__(  # noqa: PLR0913 - gin binds each of them
        self,
        model: Model,
        state: TrainState,
        partitioner: PjitPartitioner,
        rng: Key,
        num_microbatches: int | None = None,
        learning_rate_fn: Callable[[Array], Any] | None = None,
        rows_by_run: bool = False,
        teacher_cache: TeacherCache | None = None,
        image_cache: ImageCache | None = None,
    ):
        self.model = model
        self.state = state
        self.partitioner = partitioner
        self.learning_rate_fn = learning_rate_fn
        self._rng = rng
        self._totals: metrics.StepMetrics | None = None
        parts = self.num_microbatches = 1 if num_microbatches is None else num_microbatches
        self._compactor = _make_compactor(model, partitioner, parts) if rows_by_run else None
        self._teachers = None
        if teacher_cache is not None:
            self._teachers = teacher_cache.open(model, state, partitioner, parts, rows_by_run)
        self._images = image_cache and image_cache.open(model, state, partitioner)
        step: Callable[..., Any] = functools.partial(_guarded_step, model, parts)
        if rows_by_run and partitioner.splits_runs(model.runs):
            step = rows_split_over(partitioner.mesh.axis_names[:-1])(step)
        # Equal layouts can be written in several ways (with an axis of one device, for example).
        # Unless outputs have the layout of inputs, the second step is compiled again.
        layout = jax.tree.map(lambda x: getattr(x, "sharding", None), state)
        self._train_step = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
        self._eval_step = jax.jit(functools.partial(eval_step, model))
        self._merge = jax.jit(metrics.merge)
        # Dispatched steps; the device's count lags behind and stops at a loss that is not finite.
        self.step = int(state.step)
        self.ended, self.failed = np.asarray(state.ended), np.asarray(state.failed)
        # The groups whose rows are in batches.
        self._groups_in_batch = np.ones(model.runs.num_groups, bool)
        self._largest: Mapping[str, np.ndarray] = {}  # the largest batch so far

    def train(self, batch: Mapping[str, np.ndarray]) -> None:
        """Dispatches one step. Metrics accumulate on the device until `read_metrics`.

        Raises:
            OutOfMemory: the step does not fit in device memory.
        """
        self._largest = oom.larger_batch(self._largest, batch)
        annotation = jax.profiler.StepTraceAnnotation("train", step_num=self.step)  # as in T5X
        with oom.explain_oom(self, self._largest), annotation:
            self._dispatch(batch)

    def term_gradient_norms(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the gradient norm of every term of the objective on a batch, at the present
        parameters; see `train_step.term_gradient_norms`. {} for an objective of one term, and for
        fleets, whose bank may be split over the mesh."""
        if len(self.model.objective.coefficients()) == 1 or self._compactor is not None:
            return {}
        norms = functools.partial(term_gradient_norms, self.model, self.num_microbatches)
        with oom.explain_oom(self, batch), self.partitioner.activate():
            sharded = self.partitioner.shard_batch(self.with_image_features(batch))
            found = jax.jit(norms)(self.state, sharded, self._rng)
        return {name: float(norm) for name, norm in found.items()}

    def wait(self) -> None:
        """Waits for the dispatched steps. Raises the same errors as `train`."""
        with oom.explain_oom(self, self._largest):
            jax.block_until_ready(self.state.trainable)

    def _dispatch(self, batch: Mapping[str, np.ndarray]) -> None:
        """Leaves out the rows of finished runs, adds cached teacher outputs, puts the batch on the
        mesh, and starts the compiled step."""
        if self._compactor is not None:
            batch = self._compactor.pack(batch, self._groups_in_batch)
        with self.partitioner.activate():
            if self._teachers is not None:
                batch = self._teachers.add(self.state.frozen, batch)
            batch = self.with_image_features(batch)
            sharded = self.partitioner.shard_batch(batch)
            number = np.int32(self.step)
            self.state, new = self._train_step(self.state, sharded, self._rng, number)
            self._totals = new if self._totals is None else self._merge(self._totals, new)
        self.step += 1

    def with_image_features(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Returns a batch with cached features in place of its images, if the job has an
        `image_cache`. Call it inside `partitioner.activate()`.

        Raises:
            ValueError: the batch has encoded files, but the job has no cache.
        """
        if self._images is not None:
            return self._images.add(self.state.frozen, batch)
        return without_files(batch)

    @property
    def active(self) -> np.ndarray:
        """Whether each group [G] is still training, as of the last read of the devices."""
        return self.ended < 0

    def stop_groups(self, over: Sequence[bool]) -> None:
        """Stops training groups without marking them as failed. They keep their parameters.

        Args:
            over: whether to stop each group [G]. Groups that have already ended do not change.

        Raises:
            NonFiniteLoss: every group has failed.
        """
        self._read_run_status()
        ended = np.where(np.asarray(over) & (self.ended < 0), self.step, self.ended)
        if (ended != self.ended).any():
            self.ended = ended.astype(np.int32)
            on_devices = jax.device_put(self.ended, self.state.ended.sharding)
            self.state = self.state.replace(ended=on_devices)

    def compact_batches(self) -> None:
        """From the next batch on, leaves out the rows of groups that are known to have ended.

        The rows in a batch affect rounding and dropout masks. To be exactly reproducible, a resumed
        job must call this at the same steps.
        """
        if (
            self._compactor is None
            or (self._groups_in_batch == self.active).all()
            or not self.active.any()
        ):
            return
        self._groups_in_batch = self.active
        logging.info(
            "From step %d, %d of %d runs are still training; batches now contain only their rows.",
            self.step,
            sum(self._groups_in_batch[group] for group in self.model.runs.group_of_row),
            self.model.runs.num_rows,
        )

    def run_status(self) -> dict[str, Any]:
        """Returns which groups have ended, which have failed, and which have rows in batches.

        The values are those last read from the devices, as JSON values. Checkpoints store them with
        the state.
        """
        return {
            "ended": self.ended.tolist(),
            "failed": self.failed.tolist(),
            "placed": self._groups_in_batch.tolist(),
        }

    def load_run_status(self, status: Mapping[str, Any]) -> None:
        """Restores a `run_status` that was saved at the same step as the current state.

        Raises:
            ValueError: it does not have one value per group.
        """
        state = self.state
        groups = {len(status[name]) for name in ("ended", "failed", "placed")}
        if groups != {self.model.runs.num_groups}:
            raise ValueError(
                f"checkpoint_{self.step} records the status of "
                f"{' or '.join(map(str, sorted(groups)))} groups, but the job has "
                f"{self.model.runs.num_groups}. Rename it in MODEL_DIR to resume from the previous "
                "checkpoint."
            )
        self.ended = np.asarray(status["ended"], np.int32)
        self.failed = np.asarray(status["failed"], bool)
        self._groups_in_batch = np.asarray(status["placed"], bool)
        self.state = state.replace(
            ended=jax.device_put(self.ended, state.ended.sharding),
            failed=jax.device_put(self.failed, state.failed.sharding),
        )

    def reactivate_extended(self, out_of_patience: Sequence[bool], total_steps: int) -> None:
        """Reactivates groups whose schedule or patience was extended after they had ended.

        Failed groups are not reactivated. The others resume from their own last step, with the
        examples of the job's current step. Logs their names. If the job has no steps left, only
        logs a warning.

        Args:
            out_of_patience: whether each group [G] has run out of patience.
            total_steps: the number of steps of the job.
        """
        ended = (self.ended >= 0) & ~self.failed & ~np.asarray(out_of_patience, bool)
        if not ended.any():
            return
        replicated = self.state.ended.sharding
        is_over = jax.jit(self.model.optimizer_def.is_over, out_shardings=replicated)
        with self.partitioner.activate():
            over = jax.device_get(is_over(self.state.opt_state, self.state.trainable))
        reactivated = np.flatnonzero(ended & ~over)
        names_of = self.model.runs.names_of_group
        names = ", ".join(run for group in reactivated.tolist() for run in names_of(group))
        if self.step >= total_steps and names:
            logging.warning(
                "%s ended early and could resume with the current settings, but the job is already "
                "at step %d. To train further, increase TRAIN_STEPS.",
                names,
                self.step,
            )
        elif names:
            logging.info("%s had ended; training resumes from step %d.", names, self.step)
            self.ended, self._groups_in_batch = self.ended.copy(), self._groups_in_batch.copy()
            self.ended[reactivated], self._groups_in_batch[reactivated] = -1, True
            self.state = self.state.replace(ended=jax.device_put(self.ended, replicated))

    def lower(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Lowers the training and the evaluation step for a batch, ready to be compiled.

        All arrays, including those of the state, may be `ShapeDtypeStruct`s on devices that are not
        attached.
        """
        with self.partitioner.activate():
            number, training = jax.ShapeDtypeStruct((), jnp.int32), batch
            if self._teachers is not None:
                training = self._teachers.shapes(self.state.frozen, batch)
            if self._images is not None:
                batch = training = self._images.shapes(self.state.frozen, batch)
            evaluated = self.shapes_for_evaluation()
            return {
                "train": self._train_step.lower(self.state, training, self._rng, number),
                "eval": self._eval_step.lower(evaluated, batch, self.state.failed),
            }

    def shapes_for_evaluation(self) -> Params:
        """Like `params_for_evaluation`, but computes nothing: what is added to the parameters is
        `ShapeDtypeStruct`s."""
        params = self.state.params
        found = jax.eval_shape(self.model.params_for_evaluation, params)
        replicated = lambda x: jax.ShapeDtypeStruct(  # noqa: E731
            x.shape, x.dtype, sharding=self.partitioner.replicated
        )
        new = {name: x for name, x in found.items() if name not in params}
        return {**params, **jax.tree.map(replicated, new)}

    def read_metrics(self) -> dict[str, float]:
        """Waits for the dispatched steps and returns their mean metrics, over the groups that took
        each step. Logs the groups that failed.

        Raises:
            NonFiniteLoss: a step was not taken, because every group has failed. `state` is the
                state before that step.
            OutOfMemory: a step did not fit in device memory. Steps run asynchronously, so the error
                may be raised only here.
        """
        with oom.explain_oom(self, self._largest):
            return self._read_metrics()

    def _read_metrics(self) -> dict[str, float]:
        if self._totals is None:
            return {}
        totals, self._totals = jax.device_get(self._totals), None
        self._read_run_status()
        means = metrics.scalars(totals, self.model.runs)
        rates = self.model.optimizer_def.current_learning_rates(self.step)
        means |= {f"learning_rate/{label}": rate for label, rate in rates.items()}
        if self._teachers is not None:
            means |= self._teachers.metrics()
        if self._images is not None:
            means |= self._images.metrics()
        if self.learning_rate_fn is not None:
            means["learning_rate"] = float(self.learning_rate_fn(jnp.asarray(self.step)))
        return means

    def _read_run_status(self) -> None:
        """Waits for the dispatched steps, reads which groups have ended, and logs new failures.

        Raises:
            NonFiniteLoss: a step was not taken, because every group has failed.
        """
        state = self.state
        taken, ended, failed = jax.device_get((state.step, state.ended, state.failed))
        runs = self.model.runs
        for group in np.flatnonzero(failed & ~self.failed).tolist():
            logging.error(
                "%s failed: the loss or a gradient of step %d is not finite. The parameters before "
                "that step are kept, and other runs are not affected. If the learning rate is too "
                "high, lower LEARNING_RATE and train the failed run again.",
                ", ".join(runs.names_of_group(group)),
                ended[group],
            )
        self.ended, self.failed = ended, failed
        if taken != self.step:
            others = ""
            if failed.any():
                others = " for the remaining runs, and all other runs failed before that step"
            raise NonFiniteLoss(
                f"The loss or a gradient of step {taken} is not finite{others}; training stopped. "
                f"The state before step {taken} is intact. Lower LEARNING_RATE, or inspect the "
                f"batch of step {taken}."
            )

    def params_for_evaluation(self) -> Params:
        """Returns the present parameters, see `Model.params_for_evaluation`."""
        with self.partitioner.activate():
            return self.model.params_for_evaluation(self.state.params)

    def evaluate(
        self, batches: Iterable[Mapping[str, np.ndarray]], params: Params | None = None
    ) -> dict[str, float]:
        """Returns mean metrics over batches. Groups that have failed are excluded. `params` are
        those of `params_for_evaluation`, if they are known."""
        totals, failed = None, self.state.failed
        params = self.params_for_evaluation() if params is None else params
        with self.partitioner.activate():
            for batch in batches:
                sharded = self.partitioner.shard_batch(self.with_image_features(batch))
                new = self._eval_step(params, sharded, failed)
                totals = new if totals is None else self._merge(totals, new)
        return {} if totals is None else metrics.scalars(jax.device_get(totals), self.model.runs)
