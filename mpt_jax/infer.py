"""Inference to files: `python -m mpt_jax.infer --gin_file=gin/infer.gin ...`.

`infer` takes T5X's arguments and writes T5X's files, one line of JSON for each example:

    <output_dir>/<task>-<mode>.jsonl-<shard>-of-<shards>    {"inputs": {...}, "prediction": ...}
    the same with .partial                                   the lines of an unfinished file
    the same with .partial_of, or .COMPLETED                 the record of what lines depend on

The same command resumes a partial file and keeps a complete one. If the file was made from other
inputs, the command fails (`runtime.resumable_output`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from absl import flags, logging
from etils import epath
from jax.experimental import multihost_utils

from mpt_jax.artifacts import artifacts
from mpt_jax.batching import bucketing
from mpt_jax.checkpointing import checkpoint_config, restore_states
from mpt_jax.config import gin_utils
from mpt_jax.core.tree import flatten
from mpt_jax.data import datasets, task_lookup, token_reading, validation
from mpt_jax.data.classes import is_image_task
from mpt_jax.data.dataset_iterator import DatasetIterator
from mpt_jax.data.image_preprocessors import EXAMPLE_NAMES
from mpt_jax.evaluation.inference_lines import lines_of
from mpt_jax.evaluation.periodic_eval import on_device
from mpt_jax.models.model import Model
from mpt_jax.runtime import compilation_cache, malloc
from mpt_jax.runtime.arguments import refuse_ineffective
from mpt_jax.runtime.resumable_output import ResumableFile
from mpt_jax.training import initialization
from mpt_jax.training.partitioning import PjitPartitioner, to_host
from mpt_jax.training.state import TrainState

MODES = ("predict", "score", "predict_with_aux")
TEXT = "_pretokenized"


def infer(
    *,
    model: Model,
    dataset_cfg: datasets.DatasetConfig,
    restore_checkpoint_cfg: checkpoint_config.RestoreCheckpointConfig,
    partitioner: PjitPartitioner,
    output_dir: str,
    train_state_initializer_cls: Callable[..., Any],
    mode: str = "predict",
    checkpoint_period: int = 100,
    shard_id: int = 0,
    num_shards: int = 1,
    output_vocab_feature_name: str = "targets",
    file_extension: str = "jsonl",
    summarize_config_fn: Callable[..., None] = gin_utils.summarize_gin_config,
    verify_matching_vocabs_fn: Callable[..., None] | None = validation.check_vocabularies,
    merge_chunked_results: bool = True,
    checkpoint_ds_iter: bool = True,
    write_fn: Any = None,
    merge_fn: Any = None,
    keep_aux_as_numpy: bool = False,
    fallback_init_rng: int | None = None,
    use_orbax: bool = True,
) -> list[str]:
    """Writes predictions or scores for every example of every task of a mixture.

    Args:
        model: the model, configured as it was trained.
        dataset_cfg: the examples to read; its `task_feature_lengths` must be set.
        restore_checkpoint_cfg: the checkpoint to use. An empty path uses the artifact that
            `origins` names or, if the method has no prompt, the backbone.
        partitioner: the partitioner, which places arrays on the mesh.
        output_dir: the folder that files are written to.
        train_state_initializer_cls: called without arguments; its `origins` name the backbone and
            the artifact.
        mode: `'predict'` decodes, `'score'` computes the log-probability of the targets in nats,
            `'predict_with_aux'` decodes and adds the score of the decoded text. Of an image, it
            predicts the most probable class or, if the task is multi-label, the list of the classes
            with a probability above one half; the score is of every class, or of the most probable.
        checkpoint_period: the maximum number of batches that a stopped run has to repeat.
        shard_id: which part of every task to process, 0 .. num_shards - 1.
        num_shards: the number of parts that every task is divided into; each part needs a separate
            command.
        output_vocab_feature_name: the name of the feature whose vocabulary decodes predictions.
        file_extension: the extension of the files.
        summarize_config_fn: called as `(model_dir, writer, step)` for shard 0; writes config.gin.
        verify_matching_vocabs_fn: called as `(dataset_cfg, model)`; None for no check.
        merge_chunked_results, checkpoint_ds_iter, write_fn, merge_fn, keep_aux_as_numpy,
            fallback_init_rng, use_orbax: T5X's; only their defaults are accepted.

    Returns:
        The paths of the files.

    Raises:
        ValueError: a setting, task, split or length is invalid; a split is empty; no checkpoint or
            artifact is named, or several checkpoints are; the checkpoint was trained with another
            configuration; an existing file was made from other inputs; or another command is
            writing it.
        OSError: the checkpoint or artifact cannot be read, or a file cannot be written.
        RuntimeError: process 0 could not read or write its output (in the other processes).
    """
    refuse_ineffective(
        "infer",
        merge_chunked_results=(merge_chunked_results, True),
        checkpoint_ds_iter=(checkpoint_ds_iter, True),
        write_fn=(write_fn, None),
        merge_fn=(merge_fn, None),
        keep_aux_as_numpy=(keep_aux_as_numpy, False),
        fallback_init_rng=(fallback_init_rng, None),
        use_orbax=(use_orbax, True),
    )
    _check_settings(mode, checkpoint_period, shard_id, num_shards)
    validation.check_settings(dataset_cfg, "EVAL_BATCH_SIZE", partitioner.num_shards)
    compilation_cache.enable()
    if verify_matching_vocabs_fn is not None:
        verify_matching_vocabs_fn(dataset_cfg, model)
    tasks, converter = _tasks(dataset_cfg, model)
    origins = train_state_initializer_cls().origins
    state = _one_state(model, origins, partitioner, restore_checkpoint_cfg)
    malloc.keep_freed_memory()
    read = restore_checkpoint_cfg.path or origins.artifact or origins.backbone
    made_from = _made_from(model, state, read)
    made_from |= _asked(dataset_cfg, mode, output_vocab_feature_name)
    part = f"{file_extension}-{shard_id:05}-of-{num_shards:05}"
    folder = epath.Path(output_dir)
    outputs = [_output(folder / f"{task.name}-{mode}.{part}", made_from) for task in tasks]
    to_do = [
        task
        for task, output in zip(tasks, outputs, strict=True)
        if not _from_process_0(output.is_complete)
    ]
    _check_lengths(dataset_cfg, to_do, converter)
    if shard_id == 0:
        summarize_config_fn(output_dir, None, 0)
    functions = {"score": model.score_batch, "predict": model.predict_batch}
    function = functions.get(mode, model.predict_batch_with_aux)
    if model.decode_fn is None:  # of classes, whose scores are also needed for predictions
        function = model.score_batch
    compiled = on_device(function, partitioner)
    with partitioner.activate():
        params = model.params_for_evaluation(state.params)
    # Rows of similar length are batched together, so several batches are read at a time.
    window = min(bucketing.WINDOW, checkpoint_period)
    answer = functools.partial(
        lines_of,
        rows=dataset_cfg.batch_size,
        buckets=dataset_cfg.buckets(converter),
        function=functools.partial(compiled, params),
        mode=mode,
    )
    for task, output in zip(tasks, outputs, strict=True):
        done = _from_process_0(output.begin) if task in to_do else None
        if done is None:
            logging.info("%s is already complete.", output.path)
            continue
        if done:
            logging.info("%s: resuming after %d examples.", output.path, done)
        vocabulary = task.output_features[output_vocab_feature_name].vocabulary
        pairs = _examples(dataset_cfg, task, converter).shard(num_shards, shard_id)
        windows = pairs.skip(done).batch(window * dataset_cfg.batch_size)
        lines = (list(answer(rows, vocabulary=vocabulary)) for rows in DatasetIterator(windows))
        _write(output, lines, checkpoint_period // window)
    return [str(output.path) for output in outputs]


def _check_settings(mode: str, checkpoint_period: int, shard_id: int, num_shards: int) -> None:
    if mode not in MODES:
        raise ValueError(f"infer.mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if checkpoint_period < 1:
        raise ValueError(f"infer.checkpoint_period must be 1 or more, got {checkpoint_period}.")
    if num_shards < 1:
        raise ValueError(f"infer.num_shards must be 1 or more, got {num_shards}.")
    if not 0 <= shard_id < num_shards:
        raise ValueError(
            f"infer.shard_id must be in 0 .. {num_shards - 1}, got {shard_id}. Correct --shard_id "
            f"(infer.shard_id), or infer.num_shards, which is {num_shards}."
        )


def _tasks(cfg: datasets.DatasetConfig, model: Model) -> tuple[list[seqio.Task], Any]:
    """Returns the tasks to read and their feature converter.

    Raises:
        ValueError: the model has no run with the name of a task, a task lacks the split, or its
            labels cannot be used.
    """
    tasks = list(seqio.get_subtasks(cfg.provider()))
    converter = cfg.converter(model.FEATURE_CONVERTER_CLS, pack=False)
    validation.check_tasks(tasks, converter, cfg.task_feature_lengths)
    for task in tasks:
        task_lookup.check_split(task, cfg.split)
    return tasks, converter


def _one_state(
    model: Model,
    origins: initialization.Origins,
    partitioner: PjitPartitioner,
    cfg: checkpoint_config.RestoreCheckpointConfig,
) -> TrainState:
    states = list(restore_states.states(model, origins, partitioner, cfg))
    if len(states) != 1:
        raise ValueError(
            f"infer needs exactly one checkpoint, but CHECKPOINT_PATH = {cfg.path!r} with mode "
            f"{cfg.mode!r} selects {len(states)}. Set CHECKPOINT_PATH to a single checkpoint "
            "folder, and utils.RestoreCheckpointConfig.mode to 'specific'."
        )
    return states[0]


def _made_from(model: Model, state: TrainState, read: Any) -> dict[str, Any]:
    """Returns a record that identifies the parameters and the decoding function, as JSON values."""
    paths = [read] if isinstance(read, str) else read
    record = {
        "read": [str(epath.Path(path).absolute()) for path in paths],
        "step": int(state.step),
        "trained_sha256": artifacts.digest(flatten(to_host(state.trainable))),
    }
    if model.decode_fn is None:  # of classes
        return record
    decode = getattr(model.decode_fn, "func", model.decode_fn)  # of a partial
    return record | {"decode_fn": getattr(decode, "__name__", type(decode).__name__)}


def _asked(cfg: datasets.DatasetConfig, mode: str, output_feature: str) -> dict[str, Any]:
    """Returns the settings of data and outputs that lines depend on, as JSON values.

    Raises:
        ValueError: `task_feature_lengths` is not set.
    """
    if cfg.task_feature_lengths is None:
        raise ValueError(
            "DatasetConfig.task_feature_lengths is None, but infer needs a limit for each feature. "
            "Set TASK_FEATURE_LENGTHS."
        )
    return {
        "mode": mode,
        "split": cfg.split,
        "task_feature_lengths": dict(cfg.task_feature_lengths),
        "use_cached": cfg.use_cached,
        "output_vocab_feature_name": output_feature,
    }


def _dataset(cfg: datasets.DatasetConfig, task: seqio.Task) -> tf.data.Dataset:
    return task.get_dataset(
        sequence_length=cfg.task_feature_lengths,
        split=cfg.split,
        use_cached=cfg.use_cached,
        shuffle=False,
        seed=cfg.seed,
        trim_output_features=cfg.trim_output_features,
    )


def _check_lengths(cfg: datasets.DatasetConfig, tasks: list[seqio.Task], converter: Any) -> None:
    """Checks that splits are not empty and examples fit; logs how many will be truncated.

    Raises:
        ValueError: a split is empty, or examples are too long and may not be truncated.
    """
    overlong = {}
    for task in tasks:
        with task_lookup.explain_missing_data(task, cfg.split):
            overlong[task.name] = token_reading.count_examples(_dataset(cfg, task), task, cfg.split)
    validation.check_counts(overlong, cfg, converter)


def _examples(cfg: datasets.DatasetConfig, task: seqio.Task, converter: Any) -> tf.data.Dataset:
    """Returns a dataset of pairs (texts, model features): all examples, in the task's order. The
    texts of an image are its name."""
    dataset = _dataset(cfg, task)
    if is_image_task(task):
        texts = dataset.map(lambda x: {EXAMPLE_NAMES: x[EXAMPLE_NAMES][0]})
    else:
        texts = dataset.map(lambda x: {name: x[name] for name in x if name.endswith(TEXT)})
    return tf.data.Dataset.zip((texts, converter(dataset, cfg.task_feature_lengths)))


def _output(path: epath.Path, made_from: dict[str, Any]) -> ResumableFile:
    # A lock is optional: the folder may be in a bucket, or on a file system without locks.
    elsewhere = "another INFER_OUTPUT_DIR"
    return ResumableFile(path, made_from, require_lock=False, elsewhere=elsewhere)


def _from_process_0(read: Callable[[], int | None]) -> int | None:
    """Calls a function in process 0 and returns its result in every process.

    Only process 0 accesses the files, since processes that read them separately could disagree.

    Raises:
        RuntimeError: in the other processes, if the function failed; process 0 raises its error.
    """
    none, failed = -1, -2
    value, error = failed, None
    if jax.process_index() == 0:
        try:
            result = read()
            value = none if result is None else int(result)
        except Exception as caught:  # noqa: BLE001 - raised below, once the other processes know
            error = caught
    value = int(multihost_utils.broadcast_one_to_all(np.asarray(value)))
    if error is not None:
        raise error
    if value == failed:
        raise RuntimeError(
            "Process 0 could not read or write its output. See the log of process 0."
        )
    return None if value == none else value


def _write(output: ResumableFile, windows: Iterable[list[str]], period: int) -> None:
    """Appends the lines of `period` windows at a time to a file, then completes the file."""
    writes = jax.process_index() == 0
    waiting: list[str] = []
    try:
        for number, lines in enumerate(windows, start=1):
            waiting += lines if writes else []
            if writes and number % period == 0:
                output.append(waiting)
                waiting = []
        if writes:
            output.append(waiting)
            output.finish()
            logging.info("Wrote %s.", output.path)
    finally:
        output.close()


if __name__ == "__main__":
    help_text = "The part of every task to process, from 0; overrides infer.shard_id."
    flags.DEFINE_integer("shard_id", None, help_text)
    gin_utils.run_main(infer, overriding=("shard_id",))
