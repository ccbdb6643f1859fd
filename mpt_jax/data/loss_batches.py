"""Batches for the evaluation loss: every example of each task once."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf
from absl import logging

from mpt_jax.batching.collate import Batch
from mpt_jax.data import table_batches, token_tables, validation
from mpt_jax.data.datasets import DatasetConfig
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.iterators import EvalBatches, HostShard, KeptBatches, are_too_large
from mpt_jax.data.sampling import equal_shares


def eval_batches(
    cfg: DatasetConfig,
    feature_converter_cls: Callable[..., Any],
    *,
    num_batches: int | None = None,
    num_hosts: int = 1,
    host_index: int = 0,
    row_multiple: int = 1,
) -> dict[str, Callable[[], Iterable[Batch]]]:
    """Returns the batches for the evaluation loss, for each task and for all tasks together.

    Every example counts once. The last batch of a task is padded with rows of zeros, which have
    zero weight. All hosts get the same number of batches. If the tasks have equal shares of a
    training batch, a batch of one task has the rows of one share, as in the task's solo job.

    Args:
        cfg: the settings of the dataset. Tasks of a mixture that lack the split are skipped with a
            warning.
        feature_converter_cls: as for `get_dataset`.
        num_batches: maximum number of batches per task; None for all.
        num_hosts: number of hosts that share each batch.
        host_index: index of this host.
        row_multiple: the number of rows of a batch must be a multiple of this, such as the number
            of devices.

    Returns:
        {task name: function that returns all of this host's batches}. With several tasks there is
        also an entry for the mixture's name, for the batches of all tasks.

    Raises:
        ValueError: a task is unknown or not a run of the job, no task has the split, a split is
            empty or cannot be read, an example is too long, or `batch_size` is not a multiple of
            `num_hosts`.
    """
    provider = cfg.provider()
    tasks = seqio.get_subtasks(provider)
    converter = cfg.converter(feature_converter_cls, cfg.pack)
    validation.check_tasks(tasks, converter, cfg.task_feature_lengths)
    rows = _rows_of_one_task(cfg, equal_shares(provider) or 1, math.lcm(row_multiple, num_hosts))
    share = HostShard(rows, num_hosts, host_index)
    tables = {}
    for task in tasks:
        if cfg.split not in task.splits and not isinstance(provider, seqio.Task):
            logging.warning("Skipped task %s, which has no %r split.", task.name, cfg.split)
            continue
        tables[task.name] = _table(cfg, task, converter, num_batches)
    if not tables:
        raise ValueError(
            f"No task of mixture {provider.name!r} has a {cfg.split!r} split. Set "
            "DatasetConfig.split to a split that at least one of the tasks has."
        )
    batches = _batches_of_tasks(cfg, converter, tables, share)
    if provider.name not in batches and len(batches) > 1:
        parts = list(batches.values())
        batches[provider.name] = lambda: itertools.chain.from_iterable(part() for part in parts)
    return batches


def _rows_of_one_task(cfg: DatasetConfig, shares: int, multiple: int) -> int:
    """Returns the number of rows of a loss batch: one of `shares` equal shares of a training batch,
    rounded up to a multiple of `multiple`, but at most a training batch.

    In a fleet, each task fills only one share. With whole batches, the cost of evaluating K tasks
    would grow as K^2.
    """
    share = -(-cfg.batch_size // shares)
    return min(cfg.batch_size, -(-share // multiple) * multiple)


def _table(
    cfg: DatasetConfig, task: seqio.Task, converter: Any, num_batches: int | None
) -> token_tables.ExampleTable:
    """Returns the examples of one task, for at most `num_batches` batches; checks their lengths."""
    table = token_tables.read_table(
        task,
        cfg.split,
        cfg.task_feature_lengths,
        seed=cfg.seed,
        use_cached=cfg.use_cached,
        trim_output_features=cfg.trim_output_features,
        shuffle=cfg.shuffle,
        limit=-1 if num_batches is None else num_batches * cfg.batch_size,
    )
    counts = {task.name: (table.num_overlong, table.num_examples)}
    validation.check_lengths(counts, converter, cfg.task_feature_lengths)
    return table


def _batches_of_tasks(
    cfg: DatasetConfig,
    converter: Any,
    tables: Mapping[str, token_tables.ExampleTable],
    share: HostShard,
) -> dict[str, Callable[[], Iterable[Batch]]]:
    """Returns {task: function that returns its batches}. Packed rows, and those of images that are
    not kept in memory, are made for one task at a time."""
    buckets = cfg.buckets(converter)
    if type(converter) is PromptFeatureConverter and not cfg.pack:
        of_table = functools.partial(
            table_batches.every_example,
            limits=dict(cfg.task_feature_lengths or {}),
            converter=converter,
            buckets=buckets,
            share=share,
        )
        return {name: of_table([table]) for name, table in tables.items()}
    if cfg.use_memory_cache and not cfg.pack:
        rows = _converted(cfg, converter, list(tables.values()))
        sizes = {name: table.num_examples for name, table in tables.items()}
        kept = KeptBatches(rows, sizes, share, buckets)
        if not are_too_large(rows):
            return {name: functools.partial(kept.of_task, name) for name in tables}
    return {
        name: EvalBatches(
            _converted(cfg, converter, [table]), share, keep=cfg.use_memory_cache, buckets=buckets
        )
        for name, table in tables.items()
    }


def _converted(
    cfg: DatasetConfig, converter: Any, tables: Sequence[token_tables.ExampleTable]
) -> tf.data.Dataset:
    return converter(token_tables.dataset_of(tables), cfg.task_feature_lengths)
