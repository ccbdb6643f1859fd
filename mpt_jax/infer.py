"""Predictions and scores as files: `python -m mpt_jax.infer --gin_file=gin/infer.gin ...`.

`infer` takes T5X's arguments and writes T5X's files, one line of JSON for each example:

    <output_dir>/<task>-<mode>.jsonl-<shard>-of-<shards>    {"inputs": {...}, "prediction": ...}
    the same with .COMPLETED                                 the file is whole
    the same with .partial                                   a run was stopped; it goes on from here
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf
from absl import flags, logging
from etils import epath
from jax.experimental import multihost_utils

from mpt_jax import checkpoints, compilation_cache, data, gin_utils, host_memory, train_state
from mpt_jax.eval import states
from mpt_jax.eval_loop import on_device
from mpt_jax.models import PromptedEncoderDecoder
from mpt_jax.partitioning import PjitPartitioner

MODES = ("predict", "score", "predict_with_aux")
TEXT = "_pretokenized"


def infer(  # noqa: PLR0913 - T5X's arguments
    *,
    model: PromptedEncoderDecoder,
    dataset_cfg: data.DatasetConfig,
    restore_checkpoint_cfg: checkpoints.RestoreCheckpointConfig,
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
    verify_matching_vocabs_fn: Callable[..., None] | None = None,
    merge_chunked_results: bool = True,
    checkpoint_ds_iter: bool = True,
    write_fn: Any = None,
    merge_fn: Any = None,
    keep_aux_as_numpy: bool = False,
    fallback_init_rng: int | None = None,
    use_orbax: bool = True,
) -> list[str]:
    """Writes what the model says to every example of every task of a mixture.

    Args:
        model: as it was trained.
        dataset_cfg: which examples; its lengths must be given.
        restore_checkpoint_cfg: one checkpoint; an empty path takes the origins' artefact.
        partitioner: the mesh.
        output_dir: where files go.
        train_state_initializer_cls: called without arguments; its `origins` name the backbone.
        mode: `'predict'` decodes, `'score'` gives the targets' log-probability in nats,
            `'predict_with_aux'` decodes and adds the score of what was decoded.
        checkpoint_period: batches after which a stopped run does not have to start again.
        shard_id: which of `num_shards` parts of every task this run is for.
        num_shards: parts that separate runs work on.
        output_vocab_feature_name: the feature whose vocabulary decodes predictions.
        file_extension: of the files.
        summarize_config_fn: called as `(model_dir, writer, step)`; writes config.gin.
        verify_matching_vocabs_fn: called as `(dataset_cfg, model)`.
        merge_chunked_results, checkpoint_ds_iter, write_fn, merge_fn, keep_aux_as_numpy,
            fallback_init_rng, use_orbax: T5X's; only their defaults are accepted.

    Returns:
        The files.
    """
    gin_utils.refuse_ineffective(
        "infer",
        merge_chunked_results=not merge_chunked_results,
        checkpoint_ds_iter=not checkpoint_ds_iter,
        write_fn=write_fn,
        merge_fn=merge_fn,
        keep_aux_as_numpy=keep_aux_as_numpy,
        fallback_init_rng=fallback_init_rng is not None,
        use_orbax=not use_orbax,
    )
    if mode not in MODES:
        raise ValueError(f"infer.mode must be one of {MODES}, got {mode!r}.")
    if not 0 <= shard_id < num_shards:
        raise ValueError(f"infer.shard_id must be in 0 .. {num_shards - 1}, got {shard_id}.")
    compilation_cache.enable()
    host_memory.keep_freed()
    if verify_matching_vocabs_fn is not None:
        verify_matching_vocabs_fn(dataset_cfg, model)
    tasks = seqio.get_subtasks(dataset_cfg.provider())
    converter = dataset_cfg.converter(model.FEATURE_CONVERTER_CLS, pack=False)
    data.check_runs(tasks, converter)
    summarize_config_fn(output_dir, None, 0)
    state = _one_state(
        model, train_state_initializer_cls().origins, partitioner, restore_checkpoint_cfg
    )
    functions = {"score": model.score_batch, "predict": model.predict_batch}
    compiled = on_device(functions.get(mode, model.predict_batch_with_aux), partitioner)
    function = functools.partial(compiled, state.params)
    files = []
    for task in tasks:
        name = f"{task.name}-{mode}.{file_extension}-{shard_id:05}-of-{num_shards:05}"
        path = epath.Path(output_dir) / name
        vocabulary = task.output_features[output_vocab_feature_name].vocabulary
        examples = _examples(dataset_cfg, task, converter).shard(num_shards, shard_id)
        _write(path, examples, dataset_cfg, function, mode, vocabulary, checkpoint_period)
        files.append(str(path))
    return files


def _one_state(
    model: PromptedEncoderDecoder,
    origins: train_state.Origins,
    partitioner: PjitPartitioner,
    cfg: checkpoints.RestoreCheckpointConfig,
) -> train_state.TrainState:
    found = list(states(model, origins, partitioner, cfg))
    if len(found) != 1:
        raise ValueError(f"infer needs one checkpoint, and {cfg} names {len(found)}.")
    return found[0]


def _examples(cfg: data.DatasetConfig, task: seqio.Task, converter: Any) -> tf.data.Dataset:
    """Pairs (texts, model features) of every example, in the task's own order."""
    if cfg.task_feature_lengths is None:
        raise ValueError("DatasetConfig.task_feature_lengths must be given for infer.")
    dataset = task.get_dataset(
        sequence_length=cfg.task_feature_lengths,
        split=cfg.split,
        use_cached=cfg.use_cached,
        shuffle=False,
        seed=cfg.seed,
        trim_output_features=cfg.trim_output_features,
    )
    texts = dataset.map(lambda x: {name: x[name] for name in x if name.endswith(TEXT)})
    return tf.data.Dataset.zip((texts, converter(dataset, cfg.task_feature_lengths)))


def _write(
    path: epath.Path,
    examples: tf.data.Dataset,
    cfg: data.DatasetConfig,
    function: Callable[..., Any],
    mode: str,
    vocabulary: Any,
    checkpoint_period: int,
) -> None:
    """Writes one task's file; goes on where an earlier run was stopped."""
    completed, partial = path.with_name(f"{path.name}.COMPLETED"), _partial(path)
    if completed.exists():
        logging.info("%s is complete already.", path)
        return
    done = _lines_written(partial)
    if done:
        logging.info("%s: going on after %d examples.", path, done)
    writes = jax.process_index() == 0
    lines: list[str] = []
    for number, batch in enumerate(examples.skip(done).batch(cfg.batch_size), start=1):
        lines += _lines(batch, cfg.batch_size, function, mode, vocabulary)
        if writes and number % checkpoint_period == 0:
            _append(partial, lines)
            lines = []
    if writes:
        _append(partial, lines)
        partial.replace(path)
        completed.write_text("")
        logging.info("Wrote %s.", path)


def _lines(
    batch: tuple[Any, Any], rows: int, function: Callable[..., Any], mode: str, vocabulary: Any
) -> Iterator[str]:
    texts, features = jax.tree.map(lambda x: x.numpy(), batch)
    count = len(next(iter(features.values())))
    share = data.Share(rows, jax.process_count(), jax.process_index())
    outputs = function(share.of(features))
    for row in range(count):
        inputs = {name: value[row].decode() for name, value in texts.items()}
        yield json.dumps({"inputs": inputs} | _answer(outputs, row, mode, vocabulary))


def _answer(outputs: Any, row: int, mode: str, vocabulary: Any) -> dict[str, Any]:
    if mode == "score":
        return {"score": float(outputs[row])}
    tokens, aux = outputs if mode == "predict_with_aux" else (outputs, {})
    found: dict[str, Any] = {"prediction": vocabulary.decode(tokens[row].tolist())}
    if mode == "predict_with_aux":
        found["aux"] = {name: value[row].tolist() for name, value in aux.items()}
    return found


def _partial(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name}.partial")


def _lines_written(partial: epath.Path) -> int:
    """How many examples an earlier run finished; the same on every host."""
    count = 0
    if jax.process_index() == 0 and partial.exists():
        whole = partial.read_text().rpartition("\n")[0]
        count = len(whole.splitlines())
        partial.write_text(whole + "\n" if whole else "")
    return int(multihost_utils.broadcast_one_to_all(np.asarray(count)))


def _append(partial: epath.Path, lines: list[str]) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a") as file:
        file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    flags.DEFINE_integer("shard_id", None, "Which part this run is for; wins over infer.shard_id.")
    gin_utils.run_main(infer, overriding=("shard_id",))
