"""Evaluation of saved prompts: `python -m mpt_jax.eval --gin_file=gin/eval.gin ...`.

`evaluate` takes T5X's arguments, so one gin file works with both. It evaluates a checkpoint of a
training run or, if no checkpoint is named, a prompt artifact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from mpt_jax.checkpointing import checkpoint_config, restore_states
from mpt_jax.config import gin_utils
from mpt_jax.data import datasets, validation
from mpt_jax.evaluation import evaluator as evaluation
from mpt_jax.evaluation.periodic_eval import on_device
from mpt_jax.models.model import Model
from mpt_jax.runtime import compilation_cache, malloc
from mpt_jax.runtime.arguments import refuse_ineffective
from mpt_jax.training.partitioning import PjitPartitioner

Scores = dict[str, dict[str, float]]


def evaluate(
    *,
    model: Model,
    dataset_cfg: datasets.DatasetConfig,
    restore_checkpoint_cfg: checkpoint_config.RestoreCheckpointConfig,
    partitioner: PjitPartitioner,
    output_dir: str,
    train_state_initializer_cls: Callable[..., Any],
    inference_evaluator_cls: Callable[..., Any] | None = None,
    summarize_config_fn: Callable[..., None] = gin_utils.summarize_gin_config,
    training_evaluator_cls: Any = None,
    train_eval_get_dataset_fn: Any = None,
    fallback_init_rng: int | None = None,
    use_orbax: bool = True,
) -> dict[int, Scores]:
    """Decodes and scores every task of a mixture.

    Args:
        model: the model, configured as it was trained.
        dataset_cfg: the data to evaluate on.
        restore_checkpoint_cfg: the checkpoint(s) to evaluate. An empty path evaluates the artifact
            that `origins` names or, if the method has no prompt, the backbone.
        partitioner: the partitioner, which places arrays on the mesh.
        output_dir: the folder whose subfolder `inference_eval` gets metrics and predictions.
        train_state_initializer_cls: called without arguments; its `origins` name the backbone and
            the artifact.
        inference_evaluator_cls: SeqIO's Evaluator, with its gin fields bound.
        summarize_config_fn: called as `(model_dir, writer, step)`; writes config.gin.
        training_evaluator_cls: T5X's; not supported.
        train_eval_get_dataset_fn: T5X's; not supported.
        fallback_init_rng: T5X's; not supported, since nothing falls back to random values.
        use_orbax: T5X's; must be True.

    Returns:
        The scores: step -> task -> metric -> value.

    Raises:
        ValueError: a setting, task or split is invalid; neither a checkpoint nor an artifact is
            named; or a checkpoint was trained with another configuration.
        OSError: a checkpoint or artifact does not exist or cannot be read.
    """
    refuse_ineffective(
        "evaluate",
        training_evaluator_cls=(training_evaluator_cls, None),
        train_eval_get_dataset_fn=(train_eval_get_dataset_fn, None),
        fallback_init_rng=(fallback_init_rng, None),
        use_orbax=(use_orbax, True),
    )
    validation.check_settings(dataset_cfg, "EVAL_BATCH_SIZE", partitioner.num_shards)
    validation.check_vocabularies(dataset_cfg, model)
    compilation_cache.enable()
    evaluator = evaluation.InferenceEvaluator(
        dataset_cfg,
        model.FEATURE_CONVERTER_CLS,
        f"{output_dir}/inference_eval",
        evaluator_cls=inference_evaluator_cls,
        num_hosts=jax.process_count(),
        host_index=jax.process_index(),
    )
    summarize_config_fn(output_dir, None, 0)
    origins = train_state_initializer_cls().origins
    scores: dict[int, Scores] = {}
    predict = on_device(model.predict_batch, partitioner)
    score = on_device(model.score_batch, partitioner)
    for state in restore_states.states(model, origins, partitioner, restore_checkpoint_cfg):
        malloc.keep_freed_memory()
        step = int(state.step)
        with partitioner.activate():
            params = model.params_for_evaluation(state.params)
        scores[step] = evaluator.evaluate(
            functools.partial(predict, params), functools.partial(score, params), step
        )
        for task, metrics in scores[step].items():
            logging.info("step %d  %s  %s", step, task, metrics)
    evaluator.close()
    return scores


if __name__ == "__main__":
    gin_utils.run_main(evaluate)
