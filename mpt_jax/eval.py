"""Evaluation of saved prompts: `python -m mpt_jax.eval --gin_file=gin/eval.gin ...`.

`evaluate` takes T5X's arguments, so one gin file serves both. What is evaluated is a checkpoint of
a training run, or, where no checkpoint is named, the prompt artefact that the origins name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from mpt_jax.checkpointing import checkpoints, fingerprint
from mpt_jax.config import gin_utils
from mpt_jax.data import datasets
from mpt_jax.evaluation import evaluator as evaluation
from mpt_jax.evaluation.periodic_eval import on_device
from mpt_jax.models.encoder_decoder import PromptedEncoderDecoder
from mpt_jax.runtime import compilation_cache, malloc
from mpt_jax.training import initialization
from mpt_jax.training.partitioning import PjitPartitioner
from mpt_jax.training.state import TrainState, create_train_state

Scores = dict[str, dict[str, float]]


def evaluate(
    *,
    model: PromptedEncoderDecoder,
    dataset_cfg: datasets.DatasetConfig,
    restore_checkpoint_cfg: checkpoints.RestoreCheckpointConfig,
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
        model: as it was trained.
        dataset_cfg: what to evaluate on.
        restore_checkpoint_cfg: which checkpoint(s); an empty path takes the origins' artefact.
        partitioner: the mesh.
        output_dir: where metrics and predictions go, in its folder `inference_eval`.
        train_state_initializer_cls: called without arguments; its `origins` name the backbone.
        inference_evaluator_cls: SeqIO's Evaluator, with its gin fields bound.
        summarize_config_fn: called as `(model_dir, writer, step)`; writes config.gin.
        training_evaluator_cls: T5X's; not offered.
        train_eval_get_dataset_fn: T5X's; not offered.
        fallback_init_rng: T5X's; not offered, nothing falls back to random values.
        use_orbax: T5X's; always True.

    Returns:
        Step -> task -> metric -> value.
    """
    gin_utils.refuse_ineffective(
        "evaluate",
        training_evaluator_cls=training_evaluator_cls,
        train_eval_get_dataset_fn=train_eval_get_dataset_fn,
        fallback_init_rng=fallback_init_rng is not None,
        use_orbax=not use_orbax,
    )
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
    for state in states(model, origins, partitioner, restore_checkpoint_cfg):
        malloc.keep_freed()
        step = int(state.step)
        scores[step] = evaluator.evaluate(
            functools.partial(predict, state.params), functools.partial(score, state.params), step
        )
        for task, metrics in scores[step].items():
            logging.info("step %d  %s  %s", step, task, metrics)
    evaluator.close()
    return scores


def states(
    model: PromptedEncoderDecoder,
    origins: initialization.Origins,
    partitioner: PjitPartitioner,
    cfg: checkpoints.RestoreCheckpointConfig,
) -> Iterator[TrainState]:
    """The states that a restore configuration names, oldest first.

    Raises:
        FileNotFoundError: no such checkpoint; lists those there are.
        ValueError: a checkpoint of other tasks, another backbone or another method, with both
            values of what differs; neither checkpoint nor artefact named.
    """
    if not cfg.path and not origins.artefact:
        raise ValueError(
            "There is nothing to evaluate: set CHECKPOINT_PATH to a checkpoint of a run, or "
            "INITIAL_ARTEFACT to a prompt artefact."
        )
    loaded = initialization.fill(model, origins, jax.random.PRNGKey(0))
    state = create_train_state(model, loaded.params, partitioner)
    if not cfg.path:
        yield state
    ours = fingerprint.of_model(model, loaded)
    for folder, step in _wanted(cfg):
        saved = checkpoints.Checkpoints(folder, read_only=True)
        path = saved.path(step)
        # First, because shapes may differ for no other reason than these.
        fingerprint.check_reads(ours, saved.meta(step)["identity"], path)
        found = saved.restore(state, step)
        assert found is not None
        logging.info("Read %s.", path)
        yield found[0]


def _wanted(cfg: checkpoints.RestoreCheckpointConfig) -> list[tuple[str, int]]:
    """(MODEL_DIR, step) of every checkpoint that a configuration names."""
    paths: Sequence[str] = [cfg.path] if isinstance(cfg.path, str) else list(cfg.path)
    wanted = []
    for path in paths if cfg.path else ():
        folder = epath.Path(path)
        named = checkpoints.NAME.fullmatch(folder.name)
        folder = folder.parent if named else folder
        steps = checkpoints.saved_steps(folder)
        if named and cfg.mode == "specific":
            chosen = [int(named[1])]
        else:
            chosen = steps if cfg.mode == "all" else steps[-1:]
        if not chosen or not set(chosen) <= set(steps) or bool(named) != (cfg.mode == "specific"):
            there = ", ".join(str(folder / f"{checkpoints.PREFIX}_{step}") for step in steps)
            raise FileNotFoundError(
                f"No checkpoint of a run at {path} (mode {cfg.mode!r}: 'specific' names a "
                f"{checkpoints.PREFIX}_<step>, the others a MODEL_DIR). There are: "
                f"{there or 'none'}."
            )
        wanted += [(str(folder), step) for step in chosen]
    return wanted


if __name__ == "__main__":
    gin_utils.run_main(evaluate)
