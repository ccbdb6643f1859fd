"""Batches of text tasks that are made from token tables, without tf.data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpt_jax.batching import arrangements, bucketing
from mpt_jax.batching.arrangements import Arrangement
from mpt_jax.batching.bucketing import LengthBuckets
from mpt_jax.batching.table_batches import EvalBatches, Layout, TrainBatches
from mpt_jax.batching.task_texts import SIDES, TaskTexts, TextTable
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.iterators import HostShard
from mpt_jax.data.sampling import TaskMixture, equal_shares
from mpt_jax.data.token_tables import TokenTable


def of_mixture(
    mixture: TaskMixture,
    tables: Sequence[TokenTable],
    cfg: Any,
    converter: PromptFeatureConverter,
    buckets: LengthBuckets | None,
    share: HostShard,
) -> TrainBatches:
    """Returns this host's training batches.

    Args:
        mixture: the mixture.
        tables: the token table of each of its tasks.
        cfg: the `DatasetConfig`.
        converter: the feature converter, whose settings describe the batches.
        buckets: the lengths that batches are trimmed to; None for one length.
        share: this host's shard of a batch.

    Raises:
        ValueError: an example is too long or, for packing, is empty or contains id 0.
    """
    texts, layout = _described(tables, cfg.task_feature_lengths, converter, buckets, share)
    return TrainBatches(texts, _arrangement(mixture, tables, texts, layout, cfg, converter), layout)


def every_example(
    tables: Sequence[TokenTable],
    limits: Mapping[str, int],
    converter: PromptFeatureConverter,
    buckets: LengthBuckets | None,
    share: HostShard,
    trim_targets: bool = True,
) -> EvalBatches:
    """Returns this host's batches with every example of some tasks once.

    Args:
        tables: the token tables of the tasks.
        limits: the limits on the lengths of inputs and targets.
        converter, buckets, share: as for `of_mixture`. The converter does not pack.
        trim_targets: see `Layout`.

    Raises:
        ValueError: an example is too long.
    """
    texts, layout = _described(tables, limits, converter, buckets, share)
    return EvalBatches(texts, dataclasses.replace(layout, trim_targets=trim_targets))


def _described(
    tables: Sequence[TokenTable],
    limits: Mapping[str, int],
    converter: PromptFeatureConverter,
    buckets: LengthBuckets | None,
    share: HostShard,
) -> tuple[TaskTexts, Layout]:
    """Returns the texts of tables, and the layout of their batches."""
    limits = {side: limits[side] for side in SIDES}
    for table in tables:
        _check(table, limits, converter)
    texts = TaskTexts(
        [{side: TextTable(x.values[side], x.offsets[side]) for side in SIDES} for x in tables]
    )
    banks = np.array([converter.runs.row(x.name) for x in tables], np.int32)
    layout = Layout(
        banks,
        prompt_lengths=np.array(converter.prompt_lengths, np.int64)[banks],
        shape=(share.batch_size, *converter.positions(limits)),
        packed=converter.pack,
        buckets=buckets,
        num_hosts=share.num_hosts,
        host_index=share.host_index,
    )
    return texts, layout


def _arrangement(
    mixture: TaskMixture,
    tables: Sequence[TokenTable],
    texts: TaskTexts,
    layout: Layout,
    cfg: Any,
    converter: PromptFeatureConverter,
) -> Arrangement:
    order = mixture.order(tables, cfg.shuffle)
    lengths = lambda tasks, indices: texts.lengths("inputs", tasks, indices)  # noqa: E731
    if cfg.by_length:
        shares = equal_shares(mixture) or 1
        return arrangements.by_length(
            order, cfg.batch_size, lengths, shares, cfg.seed or 0, bucketing.STREAM
        )
    if not cfg.pack:
        return arrangements.unpacked(order, cfg.batch_size)

    def needed(tasks: np.ndarray, indices: np.ndarray) -> np.ndarray:
        encoder = layout.prompt_lengths[tasks] + lengths(tasks, indices)
        return np.stack([encoder, texts.lengths("targets", tasks, indices)], axis=1)

    return arrangements.packed(
        order, cfg.batch_size, needed, layout.shape[1:], converter.pack_window
    )


def _check(table: TokenTable, limits: Mapping[str, int], converter: PromptFeatureConverter) -> None:
    """Raises ValueError if an example of a table does not fit a row, or could be mistaken for
    padding."""
    for side, limit in limits.items():
        lengths = np.diff(table.offsets[side])
        if lengths.max() > limit:
            shown = ", ".join(f"{name}: {value}" for name, value in limits.items())
            raise ValueError(
                f"An example of {table.name} is longer than task_feature_lengths allows ({shown}). "
                "Raise TASK_FEATURE_LENGTHS, or truncate examples: set ON_OVERLONG to truncate, "
                "and end the preprocessors of the task with preprocessors.finish."
            )
        if not converter.pack:
            continue
        problem = None
        if lengths.min() == 0 and (side == "targets" or converter.prompt_length == 0):
            problem = "are empty"
        elif table.counts[side].zeros:
            problem = "contain id 0, which is padding"
        if problem:
            raise ValueError(
                f"Cannot pack an example of {table.name}, because its {side} {problem}. Correct "
                "the preprocessors of the task, or set DatasetConfig.pack to False."
            )
