"""Training: `python -m mpt_jax.train --gin_file=gin/mpt_source.gin`.

`train` takes T5X's arguments, so one gin file works with both trainers. It sets up a job, runs the
training loop and writes the artifacts, with the functions of training_job.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from mpt_jax.checkpointing import checkpoint_config, run_lock
from mpt_jax.config import gin_check, gin_utils
from mpt_jax.data import datasets, validation
from mpt_jax.evaluation import metric_writers
from mpt_jax.models.model import Model
from mpt_jax.runtime import compilation_cache
from mpt_jax.runtime.arguments import refuse_ineffective
from mpt_jax.runtime.preemption import stop_requests
from mpt_jax.training import optimizers, profiling, selection, train_step
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.trainer import Trainer
from mpt_jax.training_job import (
    Job,
    log_if_ended,
    make_evaluator,
    restore_or_initialize,
    write_records,
)


def train(
    *,
    model: Model,
    train_dataset_cfg: datasets.DatasetConfig,
    model_dir: str,
    total_steps: int,
    train_state_initializer_cls: Callable[..., Any],
    checkpoint_cfg: checkpoint_config.CheckpointConfig,
    partitioner: PjitPartitioner,
    trainer_cls: Callable[..., Trainer] = Trainer,
    train_eval_dataset_cfg: datasets.DatasetConfig | None = None,
    infer_eval_dataset_cfg: datasets.DatasetConfig | None = None,
    eval_steps: int = 0,
    eval_period: int = 1000,
    stats_period: int | None = None,
    random_seed: int | None = None,
    summarize_config_fn: Callable[..., None] | None = None,
    inference_evaluator_cls: Callable[..., Any] | None = None,
    actions: Mapping[str, Sequence[selection.Action]] | None = None,
    run_eval_before_training: bool = False,
    relative_steps: int | None = None,
    use_hardware_rng: bool = False,
    use_orbax: bool = True,
    concurrent_metrics: bool = False,
    gc_period: int = 0,
    verify_matching_vocabs_fn: Callable[..., None] | None = validation.check_vocabularies,
    get_dataset_fn: Callable[..., Any] | None = None,
    train_eval_get_dataset_fn: Callable[..., Any] | None = None,
    profile_steps: int | None = None,
) -> selection.Scores:
    """Trains a model; resumes if MODEL_DIR holds a checkpoint of this job.

    Args:
        model: the model to train.
        train_dataset_cfg: the training data; its `batch_size` is the global batch size.
        model_dir: MODEL_DIR, the folder that the job writes all its files to.
        total_steps: the step to train to.
        train_state_initializer_cls: called without arguments; its `origins` define initial values.
        checkpoint_cfg: when to save.
        partitioner: the partitioner, which places arrays on the mesh.
        trainer_cls: `Trainer`, with its gin fields bound.
        train_eval_dataset_cfg: the data whose loss is evaluated.
        infer_eval_dataset_cfg: the data that is decoded and scored, separately for each run.
        eval_steps: the number of batches of a loss evaluation; 0 uses all batches.
        eval_period: the number of steps between evaluations.
        stats_period: the number of steps between reports of metrics; defaults to `eval_period`.
        random_seed: the seed of initial values and dropout; None means 0.
        summarize_config_fn: called as `(model_dir, writer, step)`; writes config.gin.
        inference_evaluator_cls: SeqIO's Evaluator, with its gin fields bound.
        actions: the actions after an evaluation; keys: `'TRAIN_EVAL'` and `'INFER_EVAL'`.
        run_eval_before_training: whether to evaluate step 0 as well.
        relative_steps, use_hardware_rng: T5X's; not supported.
        use_orbax: T5X's; must be True.
        concurrent_metrics: T5X's; must be False, since actions read the metrics of their step.
        gc_period: T5X's; not supported.
        verify_matching_vocabs_fn: called as `(dataset_cfg, model)`; None for no check.
        get_dataset_fn, train_eval_get_dataset_fn: T5X's; not supported.
        profile_steps: the number of steps to trace with `jax.profiler`; None traces none.

    Returns:
        The metrics of each run at the last evaluation.

    Raises:
        ValueError: a setting is invalid, or MODEL_DIR was saved with another configuration.
        OSError: a checkpoint, an artifact or data cannot be read, or MODEL_DIR cannot be written.
        NonFiniteLoss: every run failed with a value that is not finite; the last good state is
            saved.
        OutOfMemory: a training step does not fit in device memory.
        SystemExit: SIGTERM or Ctrl-C stopped the job; the state is saved.
        ModelDirInUse: another job is writing to MODEL_DIR.
    """
    refuse_ineffective(
        "train",
        relative_steps=(relative_steps, None),
        use_hardware_rng=(use_hardware_rng, False),
        get_dataset_fn=(get_dataset_fn, None),
        train_eval_get_dataset_fn=(train_eval_get_dataset_fn, None),
        concurrent_metrics=(concurrent_metrics, False),
        gc_period=(gc_period, 0),
        use_orbax=(use_orbax, True),
    )
    _check_settings(model, checkpoint_cfg, total_steps)
    trace = profiling.StepTrace(model_dir, profile_steps)
    data_cfgs = (train_dataset_cfg, train_eval_dataset_cfg, infer_eval_dataset_cfg)
    _check_data_settings(*data_cfgs, partitioner.num_shards, trainer_cls)
    compilation_cache.enable()
    seed, started = random_seed or 0, time.monotonic()
    save_cfg = checkpoint_cfg.save or checkpoint_config.SaveCheckpointConfig()
    stats_period = stats_period or eval_period

    with run_lock.acquire(model_dir) as check_it_is_ours:
        if verify_matching_vocabs_fn is not None:
            verify_matching_vocabs_fn(train_dataset_cfg, model)
        start = restore_or_initialize(
            model,
            train_dataset_cfg,
            model_dir,
            train_state_initializer_cls,
            save_cfg,
            partitioner,
            trainer_cls,
            seed,
            [train_eval_dataset_cfg, infer_eval_dataset_cfg],
        )
        trainer = start.trainer
        evaluator = make_evaluator(
            start,
            train_eval_dataset_cfg,
            infer_eval_dataset_cfg,
            eval_steps,
            inference_evaluator_cls,
            actions,
        )
        over = evaluator.best.over if evaluator.best else [False] * model.runs.num_groups
        trainer.reactivate_extended(over, total_steps)
        write_records(start, total_steps, summarize_config_fn)
        progress = metric_writers.ProgressLine(
            total_steps, trainer.step, train_dataset_cfg.batch_size
        )
        log_if_ended(start, total_steps)
        job = Job(start, evaluator, progress, check_it_is_ours, trace)
        stop = False
        with stop_requests() as request, job.closing():
            # A run that was killed between a save and the evaluation of that step evaluates it
            # now. A run that had stopped early detects that here.
            if run_eval_before_training if trainer.step == 0 else job.is_due(eval_period):
                stop = job.evaluate()
            stop = stop or not trainer.active.any()
            if trainer.step < total_steps and not stop:
                job.take_first_step(started)
            progress.restart_clock(trainer.step)
            while trainer.step < total_steps and not stop:
                # The order matters: metrics first, because they show whether the state is good;
                # then the save, so that an error of the evaluation does not lose steps.
                if job.is_due(stats_period, save_cfg.period, eval_period):
                    job.report()
                if job.is_due(stats_period, eval_period):
                    trainer.compact_batches()  # at steps that do not depend on interruptions
                if job.is_due(save_cfg.period):
                    job.save_checkpoint()
                if job.is_due(eval_period):
                    stop = job.evaluate()
                stop = stop or not trainer.active.any() or request.is_due(trainer.step)
                if not stop:
                    job.take_step()
            job.report()
            job.save_checkpoint()
            if request.signal is None and evaluator.last_step != trainer.step:
                evaluator.run()
        if request.signal is not None:
            # The exit code tells a scheduler that the run can be started again.
            logging.info("Stopped by signal %d. The same command resumes the run.", request.signal)
            sys.exit(request.exit_code)

        job.finalize()
        return evaluator.scores


def _check_settings(
    model: Model, cfg: checkpoint_config.CheckpointConfig, total_steps: int
) -> None:
    if cfg.restore is not None:
        raise ValueError(
            "CheckpointConfig.restore would have no effect: a job resumes from its MODEL_DIR, and "
            "initial values come from train_state.Origins. Set utils.CheckpointConfig.restore to "
            "None."
        )
    if total_steps:  # a stage without steps only writes its initial values
        optimizers.check_annealing(model.prompt.schedule_steps, total_steps)


def _check_data_settings(
    train_cfg: datasets.DatasetConfig,
    loss_cfg: datasets.DatasetConfig | None,
    infer_cfg: datasets.DatasetConfig | None,
    num_shards: int,
    trainer_cls: Callable[..., Trainer],
) -> None:
    rows = "PACKED_ROWS" if train_cfg.pack else "BATCH_SIZE"
    settings = {rows: (train_cfg, loss_cfg), "EVAL_BATCH_SIZE": (infer_cfg,)}
    for setting, cfgs in settings.items():
        for cfg in filter(None, cfgs):
            validation.check_settings(cfg, setting, num_shards)
    # The trainer, which has this setting, is made after the data and the backbone have been read.
    if (parts := gin_check.bound_argument(trainer_cls, "num_microbatches")) is not None:
        train_step.check_microbatches(train_cfg.batch_size, parts)


if __name__ == "__main__":
    gin_utils.run_main(train)
