"""Training: `python -m mpt_jax.train --gin_file=gin/mpt_source.gin`.

`train` takes T5X's arguments, so one gin file serves both trainers. It reads from top to bottom:
data, state, evaluation, loop, artefact.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import seqio
from absl import logging
from etils import epath

from mpt_jax import convert
from mpt_jax.artifacts import model_card, provenance
from mpt_jax.checkpointing import checkpoints, data_position, fingerprint, run_lock
from mpt_jax.config import gin_utils
from mpt_jax.core.tree import flatten
from mpt_jax.data import datasets, sampling, task_lookup
from mpt_jax.evaluation import evaluator as evaluation
from mpt_jax.evaluation import finalize, metric_writers
from mpt_jax.evaluation.finalize import ARTEFACT as ARTEFACT  # noqa: PLC0414 - its readers look here
from mpt_jax.evaluation.periodic_eval import Evaluation
from mpt_jax.models.encoder_decoder import BACKBONE, PromptedEncoderDecoder
from mpt_jax.runtime import compilation_cache, malloc
from mpt_jax.runtime.preemption import end_without_peers, stop_requests
from mpt_jax.training import initialization, oom, optimizers, selection
from mpt_jax.training.partitioning import PjitPartitioner, to_host
from mpt_jax.training.state import (
    TrainState,
    create_train_state,
    num_params,
    num_trainable_params,
    trainable_labels,
)
from mpt_jax.training.trainer import NonFiniteLoss, Trainer

TRAINED_BACKBONE = "backbone"


def train(  # noqa: PLR0913, PLR0915, C901 - T5X's arguments; read from top to bottom
    *,
    model: PromptedEncoderDecoder,
    train_dataset_cfg: datasets.DatasetConfig,
    model_dir: str,
    total_steps: int,
    train_state_initializer_cls: Callable[..., Any],
    checkpoint_cfg: checkpoints.CheckpointConfig,
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
    concurrent_metrics: bool = True,
    gc_period: int = 0,
    verify_matching_vocabs_fn: Callable[..., None] | None = None,
    get_dataset_fn: Callable[..., Any] | None = None,
    train_eval_get_dataset_fn: Callable[..., Any] | None = None,
) -> selection.Scores:
    """Trains a model; resumes by itself where MODEL_DIR holds a checkpoint of this run.

    Args:
        model: what to train.
        train_dataset_cfg: training data; `batch_size` is the global batch.
        model_dir: MODEL_DIR, where everything the run makes lies.
        total_steps: the step to train to.
        train_state_initializer_cls: called without arguments; its `origins` say where first
            values come from.
        checkpoint_cfg: when to save.
        partitioner: the mesh.
        trainer_cls: `Trainer`, with its gin fields bound.
        train_eval_dataset_cfg: data whose loss is evaluated.
        infer_eval_dataset_cfg: data that is decoded and scored, each run by itself.
        eval_steps: batches of a training evaluation; 0 takes all.
        eval_period: steps between evaluations.
        stats_period: steps between metrics; default `eval_period`.
        random_seed: of initial values and dropout; None is 0.
        summarize_config_fn: called as `(model_dir, writer, step)`; writes config.gin.
        inference_evaluator_cls: SeqIO's Evaluator, with its gin fields bound.
        actions: what may follow an evaluation, by `'TRAIN_EVAL'`, `'INFER_EVAL'` or `'TRAIN'`.
        run_eval_before_training: evaluates step 0 too.
        relative_steps: T5X's; not offered.
        use_hardware_rng: T5X's; not offered.
        use_orbax: T5X's; always True.
        concurrent_metrics: T5X's; here metrics are always written concurrently.
        gc_period: T5X's; not offered.
        verify_matching_vocabs_fn: called as `(dataset_cfg, model)`.
        get_dataset_fn: T5X's; not offered.
        train_eval_get_dataset_fn: T5X's; not offered.

    Returns:
        The last scores of each run.

    Raises:
        NonFiniteLoss: the losses of all runs were not finite; the last good state is saved.
        OutOfMemory: a training step does not fit a device.
        SystemExit: SIGTERM or Ctrl-C; the state is saved.
        Occupied: another run writes to MODEL_DIR.
    """
    gin_utils.refuse_ineffective(
        "train",
        relative_steps=relative_steps,
        use_hardware_rng=use_hardware_rng,
        get_dataset_fn=get_dataset_fn,
        train_eval_get_dataset_fn=train_eval_get_dataset_fn,
        gc_period=gc_period,
        use_orbax=not use_orbax,
    )
    if checkpoint_cfg.restore is not None:
        raise ValueError(
            "CheckpointConfig.restore would have no effect: a run resumes from its own MODEL_DIR, "
            "and first values come from train_state.Origins. Set it to None."
        )
    if total_steps:  # none are taken where a stage only hands on what it starts from
        optimizers.check_annealing(model.prompt.own_steps, total_steps)
    compilation_cache.enable()
    seed, started = random_seed or 0, time.monotonic()

    with run_lock.held(model_dir) as check_it_is_ours:
        # --- Data --------------------------------------------------------------------------------
        if verify_matching_vocabs_fn is not None:
            verify_matching_vocabs_fn(train_dataset_cfg, model)
        hosts = {"num_hosts": jax.process_count(), "host_index": jax.process_index()}
        batches = datasets.train_iterator(train_dataset_cfg, model.FEATURE_CONVERTER_CLS, **hosts)

        # --- State: 1. own checkpoint, 2. initial artefact, 3. initial values --------------------
        origins = train_state_initializer_cls().origins
        loaded = initialization.fill(model, origins, jax.random.PRNGKey(seed))
        by_run = model.runs.num_groups > 1 and sampling.has_equal_shares(train_dataset_cfg)
        state = create_train_state(model, loaded.params, partitioner, by_run)
        ours = fingerprint.of_run(model, loaded, train_dataset_cfg.batch_size, seed)
        loaded = dataclasses.replace(loaded, params={})  # the state holds them now
        malloc.keep_freed()
        save = checkpoint_cfg.save or checkpoints.SaveCheckpointConfig()
        saved = checkpoints.Checkpoints(model_dir, save.keep)
        position = data_position.DataPosition(batches if save.save_dataset else None)
        resumed = _resumed(state, saved, position, ours)
        trainer = trainer_cls(
            model=model,
            state=state if resumed is None else resumed[0],
            partitioner=partitioner,
            rng=jax.random.PRNGKey(seed),
            rows_by_run=by_run,
        )
        if resumed is not None and "runs" in resumed[1]:  # earlier versions saved none
            trainer.resume(resumed[1]["runs"])
        total = num_params(state.params)
        learning = num_trainable_params(model, state.trainable)
        labels = trainable_labels(model, state.params)
        logging.info("%s", metric_writers.describe_counts(learning, total, sorted(labels)))

        # --- Evaluation and reporting ------------------------------------------------------------
        writers = metric_writers.Writers(model_dir)
        converter = model.FEATURE_CONVERTER_CLS
        losses = train_eval_dataset_cfg and datasets.eval_batches(
            train_eval_dataset_cfg, converter, num_batches=eval_steps or None, **hosts
        )
        inference = infer_eval_dataset_cfg and evaluation.InferenceEvaluator(
            infer_eval_dataset_cfg,
            converter,
            f"{model_dir}/inference_eval",
            evaluator_cls=inference_evaluator_cls,
            **hosts,
        )
        evaluator = Evaluation(trainer, writers, losses, inference, actions or {})
        evaluator.resume()
        over = evaluator.best.over if evaluator.best else [False] * model.runs.num_groups
        trainer.reopen(over, total_steps)
        if summarize_config_fn is not None:
            summarize_config_fn(model_dir, None, trainer.step)
        metric_writers.write_run_record(
            model_dir,
            {"seed": seed, "first_step": trainer.step, "total_steps": total_steps, **ours}
            | {"parameters": total, "trainable_parameters": learning}
            | {"prompt_length": model.prompt.prompt_length}
            | task_lookup.few_shot_rows(train_dataset_cfg.provider()),
        )

        def save_checkpoint() -> None:
            check_it_is_ours(read=True)
            data_at = position.at(int(trainer.state.step), trainer.step)
            meta = {"identity": ours, "data": data_at, "runs": trainer.standing()}
            saved.save(trainer.state, meta)

        # --- The loop ----------------------------------------------------------------------------
        progress = metric_writers.ProgressLine(
            total_steps, trainer.step, train_dataset_cfg.batch_size
        )
        stats_period = stats_period or eval_period
        if resumed is not None and trainer.step >= total_steps:
            logging.info("%s has been trained to step %d already.", model_dir, trainer.step)
        elif not trainer.active.any():
            logging.info("All runs of %s have ended; nothing is left to train.", model_dir)
        is_due = lambda period: bool(period) and trainer.step % period == 0  # noqa: E731
        stop, largest = False, {}
        configs = (train_dataset_cfg, infer_eval_dataset_cfg)
        with stop_requests() as request:
            try:
                # A run that was killed after a save and before the evaluation of that step makes up
                # for it; one that had stopped early finds out here that it had.
                if run_eval_before_training if trainer.step == 0 else is_due(eval_period):
                    stop = evaluator.run()
                    trainer.give_up_places()
                stop = stop or not trainer.active.any()
                if trainer.step < total_steps and not stop:
                    largest = next(batches)
                    writers.write("train", trainer.step, _first_step(trainer, largest, started))
                progress.restart_clock(trainer.step)
                while trainer.step < total_steps and not stop:
                    # The order matters: metrics first, because they tell whether the state is good;
                    # then the save, so that nothing an evaluation may raise loses a step.
                    if is_due(stats_period) or is_due(save.period) or is_due(eval_period):
                        _report(trainer, writers, progress, largest)
                    if is_due(stats_period) or is_due(eval_period):
                        trainer.give_up_places()  # at steps that do not depend on who stops it
                    if is_due(save.period):
                        save_checkpoint()
                    if is_due(eval_period):
                        stop = evaluator.run()
                        trainer.give_up_places()
                        progress.restart_clock(trainer.step)
                    stop = stop or not trainer.active.any() or request.is_due(trainer.step)
                    if not stop:
                        check_it_is_ours()
                        batch = next(batches)
                        largest = oom.larger(largest, batch)
                        with oom.explained(trainer, largest):
                            trainer.train(batch)
                _report(trainer, writers, progress, largest)
                save_checkpoint()
                if request.signal is None and evaluator.last_step != trainer.step:
                    evaluator.run()
            except NonFiniteLoss:
                save_checkpoint()
                if model.runs.num_groups > 1:
                    hand_on(model_dir, loaded, origins, evaluator, *configs, all_failed=True)
                raise
            except jax.errors.JaxRuntimeError as error:
                end_without_peers(error)
                raise
            finally:
                progress.close()
                writers.close()
                saved.close()  # last, because it raises where a save failed
        if request.signal is not None:
            # A scheduler can tell by the code that the run may be started again.
            logging.info("Stopped by signal %d; the same command resumes here.", request.signal)
            sys.exit(request.exit_code)

        hand_on(model_dir, loaded, origins, evaluator, *configs)
        return evaluator.scores


def _resumed(
    state: TrainState,
    saved: checkpoints.Checkpoints,
    position: data_position.DataPosition,
    ours: fingerprint.Identity,
) -> tuple[TrainState, dict[str, Any]] | None:
    """The state of this run's last checkpoint and what was saved beside it, with the data's
    position put there; None at the start of a run."""
    if (restored := saved.restore(state)) is None:
        return None
    state, meta = restored
    step = int(state.step)
    fingerprint.check_resumes(ours, meta["identity"], str(saved.model_dir))
    saved.set_aside_after(step)
    position.restore(meta["data"], step)
    logging.info("Resumed from %s.", saved.path(step))
    return state, meta


def hand_on(
    model_dir: str,
    loaded: initialization.Loaded,
    origins: initialization.Origins,
    evaluator: Evaluation,
    train_cfg: datasets.DatasetConfig,
    infer_cfg: datasets.DatasetConfig | None,
    all_failed: bool = False,
) -> None:
    """Writes what a finished run leaves to others: its prompts, and a backbone that has learnt; of
    several groups that have all failed, those that were at their best before."""
    params, step = to_host(evaluator.best_params()), evaluator.best_step()
    if jax.process_index() != 0:
        return
    if "prompt" in params:
        facts = card_facts(train_cfg, infer_cfg, evaluator)
        prompt = params["prompt"]
        name = origins.name
        finalize.write_artefacts(model_dir, evaluator, prompt, loaded, name, facts, all_failed)
    if any(re.fullmatch(BACKBONE, name) for name in flatten(evaluator.trainer.state.trainable)):
        backbone = {name: params[name] for name in params if name not in ("prompt", "teacher")}
        folder = epath.Path(model_dir) / TRAINED_BACKBONE
        folder.rmtree(missing_ok=True)  # of an earlier end of this run
        logging.info("Trained backbone: %s", convert.save_t5x(folder, backbone, step))


def card_facts(
    train_cfg: datasets.DatasetConfig,
    infer_cfg: datasets.DatasetConfig | None,
    evaluator: Evaluation,
) -> model_card.Facts:
    """What the model card says of a run beside its artefact's configuration."""
    provider = train_cfg.provider()
    return model_card.Facts(
        data={task.name: model_card.data_of(task) for task in seqio.get_subtasks(provider)},
        trained_on=getattr(provider, "overlong", {}),
        evaluated=evaluator.inference.num_examples if evaluator.inference else {},
        evaluated_split=infer_cfg.split if infer_cfg else "",
        trained_numbers=num_trainable_params(
            evaluator.trainer.model, evaluator.trainer.state.trainable
        ),
        git_revision=provenance.git_revision(),
        packages=provenance.package_versions(),
    )


def _first_step(trainer: Trainer, batch: Mapping[str, Any], started: float) -> dict[str, float]:
    """Takes the first step; returns how long compiling and starting took."""
    before = time.monotonic()
    with oom.explained(trainer, batch):
        trainer.train(batch)
        jax.block_until_ready(trainer.state.trainable)
    seconds = {
        "timing/compilation_seconds": time.monotonic() - before,
        "timing/start_to_first_step_seconds": time.monotonic() - started,
    }
    logging.info("First step after %.1f s.", seconds["timing/start_to_first_step_seconds"])
    return seconds


def _report(
    trainer: Trainer,
    writers: metric_writers.Writers,
    progress: metric_writers.ProgressLine,
    largest: Mapping[str, Any],
) -> None:
    with oom.explained(trainer, largest):  # steps run while the host goes on
        found = trainer.read_metrics()
    if found:
        speeds = progress.update(trainer.step, found)
        writers.write("train", trainer.step, {**found, **speeds})


if __name__ == "__main__":
    gin_utils.run_main(train)
