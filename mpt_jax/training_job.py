"""Setup of a training job, and the actions of the training loop in train.py."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from mpt_jax.checkpointing import checkpoint_config, checkpoints, data_position, fingerprint
from mpt_jax.data import datasets, records, sampling, task_lookup
from mpt_jax.data.iterators import TrainIterator
from mpt_jax.data.loss_batches import eval_batches
from mpt_jax.evaluation import evaluator as evaluation
from mpt_jax.evaluation import finalize, metric_writers, periodic_eval
from mpt_jax.evaluation.periodic_eval import PeriodicEvaluator
from mpt_jax.models.model import Model
from mpt_jax.runtime import malloc
from mpt_jax.runtime.preemption import exit_if_peer_lost
from mpt_jax.training import initialization, profiling, selection
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import (
    TrainState,
    create_train_state,
    num_params,
    num_trainable_params,
    trainable_labels,
)
from mpt_jax.training.trainer import NonFiniteLoss, Trainer


@dataclasses.dataclass(frozen=True)
class Start:
    """Data and state at the step where training starts.

    Attributes:
        model_dir: MODEL_DIR.
        data_cfg: the configuration of the training data.
        seed: the seed of initial values and dropout.
        batches: the iterator over the training data.
        trainer: the trainer, which holds the state.
        initial: the digests of the initial values, and the rows that prompts started from; its
            `params` are empty, since the trainer holds them.
        backbone: the name of the backbone.
        fingerprint: the fingerprint of the job, saved with every checkpoint.
        saved: the checkpoints of the job.
        position: the position in the training data, saved with every checkpoint.
        resumed: whether the state was restored from a checkpoint.
    """

    model_dir: str
    data_cfg: datasets.DatasetConfig
    seed: int
    batches: TrainIterator
    trainer: Trainer
    initial: initialization.InitialParams
    backbone: str
    fingerprint: fingerprint.Fingerprint
    saved: checkpoints.Checkpoints
    position: data_position.DataPosition
    resumed: bool


def restore_or_initialize(  # noqa: PLR0913 - the arguments of `train` that it uses
    model: Model,
    data_cfg: datasets.DatasetConfig,
    model_dir: str,
    initializer_cls: Callable[..., Any],
    save_cfg: checkpoint_config.SaveCheckpointConfig,
    partitioner: PjitPartitioner,
    trainer_cls: Callable[..., Trainer],
    seed: int,
    eval_cfgs: Sequence[datasets.DatasetConfig | None] = (),
) -> Start:
    """Builds the data iterator, the state and the trainer.

    The state is restored from the job's last checkpoint. If there is none, prompts start from the
    initial artifact, or from the method's initial values if no artifact is named. The datasets of
    `eval_cfgs` are included in the job's fingerprint.
    """
    _require_optimizer(model)
    batches = datasets.train_iterator(data_cfg, model.FEATURE_CONVERTER_CLS, **_hosts())
    origins = initializer_cls().origins
    initial = initialization.initialize_params(model, origins, jax.random.PRNGKey(seed))
    by_run = model.runs.num_groups > 1 and sampling.has_equal_shares(data_cfg)
    state = create_train_state(model, initial.params, partitioner, by_run)
    data = records.of_job([data_cfg, *eval_cfgs])
    ours = fingerprint.run_fingerprint(model, initial, data_cfg.batch_size, seed, data)
    initial = dataclasses.replace(initial, params={})  # the state holds them now
    malloc.keep_freed_memory()
    saved = checkpoints.Checkpoints(model_dir, save_cfg.keep)
    position = data_position.DataPosition(batches if save_cfg.save_dataset else None)
    resumed = _restore(state, saved, position, ours)
    trainer = trainer_cls(
        model=model,
        state=state if resumed is None else resumed[0],
        partitioner=partitioner,
        rng=jax.random.PRNGKey(seed),
        rows_by_run=by_run,
    )
    if resumed is not None and "runs" in resumed[1]:  # earlier versions saved none
        trainer.load_run_status(resumed[1]["runs"])
    counts = num_trainable_params(model, state.trainable), num_params(state.params)
    labels = sorted(trainable_labels(model, state.params))
    devices = jax.devices()
    logging.info(
        "Training %d run(s) on %d x %s in %s.",
        model.runs.num_rows,
        len(devices),
        devices[0].device_kind,
        model_dir,
    )
    logging.info("%s", metric_writers.describe_counts(*counts, labels))
    return Start(
        model_dir,
        data_cfg,
        seed,
        batches,
        trainer,
        initial,
        origins.name,
        ours,
        saved,
        position,
        resumed=resumed is not None,
    )


def _require_optimizer(model: Model) -> None:
    """Raises ValueError if a model cannot be trained, such as zero-shot CLIP."""
    if model.optimizer_def is None:
        raise ValueError(
            f"The method {model.prompt.name!r} cannot be trained, because it has no optimizer "
            "(OPTIMIZER is None). To evaluate it, run python -m t5x.eval --gin_file=gin/eval.gin "
            "with its file of gin/methods. To train, choose another file, such as "
            "gin/methods/coop.gin."
        )


def _restore(
    state: TrainState,
    saved: checkpoints.Checkpoints,
    position: data_position.DataPosition,
    ours: fingerprint.Fingerprint,
) -> tuple[TrainState, dict[str, Any]] | None:
    """Restores this job's last checkpoint and moves the data to its position.

    Returns the state and the metadata saved with it, or None if the job has no checkpoint.
    """
    if (restored := saved.restore(state)) is None:
        return None
    state, meta = restored
    step = int(state.step)
    fingerprint.check_can_resume(ours, meta.get("identity", {}), str(saved.model_dir))
    saved.rename_unreadable_after(step)
    position.restore(meta.get("data"), step)
    logging.info("Resumed from %s.", saved.path(step))
    return state, meta


def make_evaluator(
    start: Start,
    loss_cfg: datasets.DatasetConfig | None,
    infer_cfg: datasets.DatasetConfig | None,
    num_batches: int,
    evaluator_cls: Callable[..., Any] | None,
    actions: Mapping[str, Sequence[selection.Action]] | None,
) -> PeriodicEvaluator:
    """Builds the evaluator that runs between steps, with the best results of earlier starts.

    Runs whose task lacks the split are not evaluated, and a warning lists them. A group with only
    such runs keeps the parameters of its last step.

    Raises:
        ValueError: a setting is invalid, or an action other than `SelectBest` could never run.
    """
    trainer, loss_asked, infer_asked = start.trainer, loss_cfg, infer_cfg
    loss_cfg, _ = datasets.with_split(loss_cfg) if loss_cfg else (None, ())
    infer_cfg, absent = datasets.with_split(infer_cfg) if infer_cfg else (None, ())
    not_evaluated = {run: infer_asked.split for run in absent if infer_asked}
    periodic_eval.warn_not_evaluated(trainer.model.runs, not_evaluated)
    actions = dict(actions or {})
    if infer_asked and infer_cfg is None:
        kept = actions.get("INFER_EVAL", ())
        actions["INFER_EVAL"] = [a for a in kept if not isinstance(a, selection.SelectBest)]
    periodic_eval.check_actions(
        actions, TRAIN_EVAL=(loss_asked, loss_cfg), INFER_EVAL=(infer_asked, infer_cfg)
    )
    for action in (each for of_mode in actions.values() for each in of_mode):
        if isinstance(action, selection.SelectBest):
            action.data, action.unscored = records.of_job([infer_cfg]), set(absent)
    writers = metric_writers.Writers(start.model_dir)
    converter = trainer.model.FEATURE_CONVERTER_CLS
    losses = loss_cfg and eval_batches(
        loss_cfg,
        converter,
        num_batches=num_batches or None,
        row_multiple=jax.device_count(),
        **_hosts(),
    )
    inference = infer_cfg and evaluation.InferenceEvaluator(
        infer_cfg,
        converter,
        f"{start.model_dir}/inference_eval",
        evaluator_cls=evaluator_cls,
        **_hosts(),
    )
    evaluator = PeriodicEvaluator(
        trainer, writers, losses, inference, actions, not_evaluated=not_evaluated
    )
    if inference and evaluator.selecting is not None:
        periodic_eval.warn_of_small_sets(inference.num_examples, inference.split)
    evaluator.resume()
    return evaluator


def _hosts() -> dict[str, int]:
    return {"num_hosts": jax.process_count(), "host_index": jax.process_index()}


def write_records(
    start: Start, total_steps: int, summarize_config_fn: Callable[..., None] | None
) -> None:
    """Writes config.gin and a line of run.jsonl, which describe this start."""
    if summarize_config_fn is not None:
        summarize_config_fn(start.model_dir, None, start.trainer.step)
    trainer = start.trainer
    model, state = trainer.model, trainer.state
    facts: dict[str, Any] = {
        "seed": start.seed,
        "first_step": trainer.step,
        "total_steps": total_steps,
    }
    facts |= {
        **start.fingerprint,
        "parameters": num_params(state.params),
        "trainable_parameters": num_trainable_params(model, state.trainable),
        "prompt_length": model.prompt.prompt_length,
        "task_feature_lengths": start.data_cfg.task_feature_lengths,
    }
    provider = start.data_cfg.provider()
    shared = model.runs.num_groups < model.runs.num_rows
    if exposure := sampling.report_exposure(provider, total_steps, shared):
        facts["exposure"] = exposure
    few_shot = task_lookup.few_shot_rows(provider)
    metric_writers.write_run_record(start.model_dir, facts | few_shot)


def log_if_ended(start: Start, total_steps: int) -> None:
    """Logs a line if a resumed job is at its last step, or if all of its runs have ended."""
    if start.resumed and start.trainer.step >= total_steps:
        logging.info("%s is already trained to step %d.", start.model_dir, start.trainer.step)
    elif not start.trainer.active.any():
        logging.info("All runs of %s have ended; nothing is left to train.", start.model_dir)


@dataclasses.dataclass(frozen=True)
class Job:
    """A job in training: its saves, reports, evaluations and final artifacts.

    Attributes:
        start: the data and state at the step where training starts.
        evaluator: the evaluator that runs between steps.
        progress: the progress line on the terminal.
        check_it_is_ours: a function that raises ModelDirInUse if another job has taken MODEL_DIR.
        trace: the profiler trace of a few steps, if any.
    """

    start: Start
    evaluator: PeriodicEvaluator
    progress: metric_writers.ProgressLine
    check_it_is_ours: Callable[..., None]
    trace: profiling.StepTrace

    @property
    def trainer(self) -> Trainer:
        """The trainer, which holds the state."""
        return self.start.trainer

    def is_due(self, *periods: int | None) -> bool:
        """Whether this step is a multiple of any period; None and 0 are ignored."""
        return any(period and self.trainer.step % period == 0 for period in periods)

    def take_first_step(self, started: float) -> None:
        """Takes the first step and reports the time of compilation and startup.

        Args:
            started: the time at which the job started, from `time.monotonic`.
        """
        batch, step = next(self.start.batches), self.trainer.step
        if step == 0 and (norms := self.trainer.term_gradient_norms(batch)):
            shown = ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())
            logging.info("Gradient norms of the loss terms at step %d: %s.", step, shown)
            by_term = {f"gradient_norm/{name}": norm for name, norm in norms.items()}
            self.evaluator.writers.write("train", step, by_term)
        before = time.monotonic()
        self.trainer.train(batch)
        self.trainer.wait()
        now = time.monotonic()
        seconds = {
            "timing/compilation_seconds": now - before,
            "timing/start_to_first_step_seconds": now - started,
        }
        logging.info("First step after %.1f s.", now - started)
        self.evaluator.writers.write("train", step, seconds)
        self.trace.after_step(self.trainer)

    def take_step(self) -> None:
        """Dispatches one step."""
        self.check_it_is_ours()
        self.trainer.train(next(self.start.batches))
        self.trace.after_step(self.trainer)

    def report(self) -> None:
        """Writes the mean metrics since the last report."""
        if metrics := self.trainer.read_metrics():
            speeds = self.progress.update(self.trainer.step, metrics)
            self.evaluator.writers.write("train", self.trainer.step, {**metrics, **speeds})

    def save_checkpoint(self) -> None:
        """Starts saving the state, the data position and the status of the runs."""
        self.check_it_is_ours(read=True)
        trainer = self.trainer
        position = self.start.position.at(int(trainer.state.step), trainer.step)
        meta = {"identity": self.start.fingerprint, "data": position, "runs": trainer.run_status()}
        self.start.saved.save(trainer.state, meta)

    def evaluate(self) -> bool:
        """Evaluates, and drops the rows of ended runs from batches. Returns whether to stop."""
        stop = self.evaluator.run()
        self.trainer.compact_batches()
        self.progress.restart_clock(self.trainer.step)
        return stop

    def finalize(self, all_failed: bool = False) -> None:
        """Writes the final artifacts.

        Args:
            all_failed: whether the job ends because every run has failed.
        """
        inference = self.evaluator.inference
        ended = finalize.EndedJob(
            self.trainer,
            self.evaluator.best,
            self.evaluator.scores,
            self.start.initial,
            self.start.backbone,
            self.start.data_cfg,
            evaluated=inference.num_examples if inference else {},
            evaluated_split=inference.split if inference else "",
            not_evaluated=self.evaluator.not_evaluated,
            data=self.start.fingerprint[fingerprint.DATA],
            all_failed=all_failed,
        )
        finalize.finalize_run(self.start.model_dir, ended)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Closes the trace, the progress line, the writers and the checkpoints after the block.

        If all runs have failed, first saves the last good state and, in a job of several groups,
        writes the final artifacts. If another process of the job was lost, ends this process.
        """
        try:
            with self.trace:
                yield
        except NonFiniteLoss:
            self.save_checkpoint()
            if self.trainer.model.runs.num_groups > 1:
                self.finalize(all_failed=True)
            raise
        except jax.errors.JaxRuntimeError as error:
            exit_if_peer_lost(error)
            raise
        finally:
            self.progress.close()
            self.evaluator.writers.close()
            self.start.saved.close()  # last, because it raises if a save failed
