"""From a `DatasetConfig` to batches: NumPy dictionaries in the batch contract.

`DatasetConfig` and `get_dataset` have T5X's names and meaning.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf
from absl import logging

from mpt_jax.batching import bucketing
from mpt_jax.batching.bucketing import LengthBuckets
from mpt_jax.batching.collate import Batch
from mpt_jax.core.runs import unknown_name
from mpt_jax.data import task_lookup, token_tables, validation
from mpt_jax.data.iterators import EvalBatches, HostShard, TrainIterator
from mpt_jax.data.preprocessors import TASK_IDS
from mpt_jax.data.sampling import TaskMixture, equal_shares

_WINDOWS = zlib.crc32(b"mpt_jax.data.windows") & 0x7FFFFFFF


@dataclasses.dataclass
class DatasetConfig:
    """Which examples, how long, how many at once. Fields are T5X's.

    Attributes:
        mixture_or_task_name: a registered name, or a SeqIO task or mixture.
        task_feature_lengths: limits on `inputs` and `targets` in tokens, EOS included and prompt
            positions not. None (inference evaluation only): the longest that occur.
        split: of every task.
        batch_size: rows per step over all hosts.
        shuffle: whether each pass is in another order.
        seed: of shuffling and sampling; required for training.
        use_cached: read SeqIO's offline cache.
        pack: several examples to a row.
        use_custom_packing_ops: SeqIO's, for packing.
        module: imported first; it registers the tasks.
        use_memory_cache: keep evaluation batches in memory between evaluations.
        trim_output_features: SeqIO's own trimming; `features.end_and_limit` has cut before it.
        length_buckets: {'inputs': [...], 'targets': [...]} token limits below those of
            `task_feature_lengths`: each unpacked batch is cut to the smallest that hold it, which
            changes no number but for rounding (and, with dropout, which masks are drawn). {} for
            one length; None for lengths of our choice (`bucketing.automatic`). Ours, T5X has
            no such field.
        by_length: sorts the examples of some training batches at a time by length, so that more
            is cut off; this changes which examples meet in a batch. Ours as well.
    """

    mixture_or_task_name: Any
    task_feature_lengths: Mapping[str, int] | None
    split: str
    batch_size: int
    shuffle: bool
    seed: int | None
    use_cached: bool = False
    pack: bool = False
    use_custom_packing_ops: bool = False
    module: str | None = None
    use_memory_cache: bool = True
    trim_output_features: bool = True
    length_buckets: Mapping[str, Sequence[int]] | None = None
    by_length: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"DatasetConfig.batch_size must be positive, got {self.batch_size}.")
        if self.pack and (self.length_buckets or self.by_length):
            raise ValueError(
                "DatasetConfig.length_buckets and by_length have no effect with pack = True, whose "
                "rows have one length. Choose (docs/performance.md says which serves when)."
            )

    def provider(self) -> Any:
        """Returns the SeqIO task or mixture; raises ValueError listing the known ones."""
        task_lookup.import_suites([self.module] if self.module else [])
        name = self.mixture_or_task_name
        if not isinstance(name, str):
            return name
        if name not in seqio.MixtureRegistry.names() and not task_lookup.is_task(name):
            known = sorted(seqio.TaskRegistry.names() | seqio.MixtureRegistry.names())
            raise ValueError(unknown_name("task or mixture", name, known))
        return seqio.get_mixture_or_task(name)

    def converter(self, feature_converter_cls: Callable[..., Any], pack: bool) -> Any:
        """Returns the feature converter, built as T5X builds it."""
        if not pack:
            return feature_converter_cls(pack=False)
        return feature_converter_cls(pack=True, use_custom_packing_ops=self.use_custom_packing_ops)

    def buckets(
        self, converter: Any, limits: Mapping[str, int] | None = None
    ) -> LengthBuckets | None:
        """Returns the lengths that unpacked batches are cut to; None for one length.

        Args:
            converter: the feature converter.
            limits: what was found where `task_feature_lengths` is None.
        """
        limits = self.task_feature_lengths or limits
        prompt_length = getattr(converter, "prompt_length", None)
        if limits is None or self.pack or prompt_length is None:
            return None
        settings = self.length_buckets
        settings = bucketing.automatic(limits) if settings is None else settings
        return bucketing.of_settings(settings, prompt_length, limits) if settings else None


def get_dataset(
    cfg: DatasetConfig,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Callable[..., Any],
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = False,
) -> tf.data.Dataset:
    """Returns one host's share of the batches, as T5X's function of this name does.

    Args:
        cfg: what to read.
        shard_id: this host.
        num_shards: hosts.
        feature_converter_cls: called with `pack` and, when packing, `use_custom_packing_ops`.
        num_epochs: None for ever.
        continue_from_last_checkpoint: T5X's; must be False, since positions are restored by
            `TrainIterator.restore`.

    Raises:
        ValueError: a task, run, split, seed, batch size or length is not what it must be.
    """
    if continue_from_last_checkpoint:
        raise ValueError("continue_from_last_checkpoint must be False; see TrainIterator.restore.")
    provider = cfg.provider()
    converter = cfg.converter(feature_converter_cls, cfg.pack)
    validation.check_config(cfg, provider, converter, num_shards, endless=num_epochs is None)
    rows = cfg.batch_size // num_shards
    dataset = provider.get_dataset(
        dict(cfg.task_feature_lengths or {}),
        split=cfg.split,
        use_cached=cfg.use_cached,
        shuffle=cfg.shuffle,
        num_epochs=num_epochs,
        shard_info=seqio.ShardInfo(index=shard_id, num_shards=num_shards),
        seed=cfg.seed,
        trim_output_features=cfg.trim_output_features,
    )
    if cfg.by_length:
        dataset = by_length(dataset, rows, equal_shares(provider) or 1, cfg.seed or 0)
    dataset = converter(dataset, dict(cfg.task_feature_lengths or {}))
    dataset = dataset.batch(rows, drop_remainder=True)
    if isinstance(provider, TaskMixture):
        validation.check_lengths(provider.overlong, converter, cfg.task_feature_lengths)
    return dataset


def by_length(dataset: tf.data.Dataset, batch_size: int, shares: int, seed: int) -> tf.data.Dataset:
    """Sorts the examples of `bucketing.WINDOW` batches at a time by the length of their
    inputs, and shuffles the batches that result.

    Tasks with an equal share of each batch keep it: the examples of each are sorted among
    themselves. So a run of a grouped job meets its examples in the batches that it would meet
    them in alone.

    Args:
        dataset: endless task features (inputs, targets, task_ids).
        batch_size: B.
        shares: tasks that have B / shares examples of every batch each, in the same order; or 1.
        seed: of the shuffling.
    """
    window, share = bucketing.WINDOW, batch_size // shares

    def to_shares(x: tf.Tensor) -> tf.Tensor:  # [window * B] -> [shares, window * share]
        x = tf.transpose(tf.reshape(x, [window, shares, share]), [1, 0, 2])
        return tf.reshape(x, [shares, window * share])

    def sort(number: tf.Tensor, found: Mapping[str, tf.RaggedTensor]):
        lengths = found["inputs"].row_lengths()  # type: ignore[union-attr]
        by_share = tf.argsort(to_shares(lengths), stable=True)
        order = tf.gather(to_shares(tf.range(window * batch_size)), by_share, batch_dims=1)
        order = tf.transpose(tf.reshape(order, [shares, window, share]), [1, 0, 2])
        key = token_tables.stream_key(seed, _WINDOWS, number)
        shuffled = tf.argsort(tf.random.stateless_uniform([window], key, alg="philox"))
        order = tf.reshape(tf.gather(order, shuffled), [-1])
        return {name: tf.gather(value, order) for name, value in found.items()}

    names = ("inputs", "targets", TASK_IDS)
    texts = dataset.map(lambda example: {name: example[name] for name in names})
    windows = texts.ragged_batch(window * batch_size, drop_remainder=True).enumerate()
    return windows.map(tf.autograph.experimental.do_not_convert(sort)).unbatch()


def train_iterator(
    cfg: DatasetConfig,
    feature_converter_cls: Callable[..., Any],
    *,
    num_hosts: int = 1,
    host_index: int = 0,
) -> TrainIterator:
    """Returns this host's rows of endless training batches.

    Args:
        cfg: what to read.
        feature_converter_cls: as for `get_dataset`.
        num_hosts: hosts that share each batch.
        host_index: this host.

    Raises:
        ValueError: as `get_dataset`; the hosts do not divide the batch.
    """
    share = HostShard(cfg.batch_size, num_hosts, host_index)
    dataset = get_dataset(cfg, 0, 1, feature_converter_cls)
    options = tf.data.Options()
    options.deterministic = True
    # Models here take milliseconds to seconds a step: a few batches ahead suffice, and each one
    # more is saved with the position.
    dataset = dataset.prefetch(2).with_options(options)
    provider, converter = cfg.provider(), cfg.converter(feature_converter_cls, cfg.pack)
    sampler = getattr(provider, "sampler", None)
    identity = {
        "tasks": [task.name for task in seqio.get_subtasks(provider)],
        "sampler": repr(sampler),
        "split": cfg.split,
        "seed": cfg.seed,
        "shuffle": cfg.shuffle,
        "features": {name: list(s.shape) for name, s in sorted(dataset.element_spec.items())},
        "by_length": cfg.by_length,
        "pack_window": getattr(converter, "pack_window", None) if cfg.pack else None,
    }
    return TrainIterator(dataset, share, identity, cfg.buckets(converter))


def eval_batches(
    cfg: DatasetConfig,
    feature_converter_cls: Callable[..., Any],
    *,
    num_batches: int | None = None,
    num_hosts: int = 1,
    host_index: int = 0,
) -> dict[str, Callable[[], Iterable[Batch]]]:
    """Returns the batches for the loss on held-out examples: of each task, and of all together.

    Every example counts once. The last batch is filled up with rows of zeros, which have no
    weight; all hosts see as many batches.

    Args:
        cfg: what to read; tasks without the split are left out, and named in the log.
        feature_converter_cls: as for `get_dataset`.
        num_batches: at most so many of each task; None for all.
        num_hosts: hosts that share each batch.
        host_index: this host.

    Returns:
        {task name: function that starts over and yields this host's batches}; of several tasks
        also {mixture name: all their batches}.
    """
    provider = cfg.provider()
    tasks = seqio.get_subtasks(provider)
    converter = cfg.converter(feature_converter_cls, cfg.pack)
    validation.check_runs(tasks, converter)
    share = HostShard(cfg.batch_size, num_hosts, host_index)
    made: dict[str, Callable[[], Iterable[Batch]]] = {}
    for task in tasks:
        if cfg.split not in task.splits and not isinstance(provider, seqio.Task):
            logging.warning("Task %s has no %r split: no loss on it.", task.name, cfg.split)
            continue
        dataset = _converted(cfg, task, converter, num_batches)
        buckets = cfg.buckets(converter)
        made[task.name] = EvalBatches(dataset, share, keep=cfg.use_memory_cache, buckets=buckets)
    if not made:
        raise ValueError(f"No task of mixture {provider.name!r} has a {cfg.split!r} split.")
    if provider.name not in made and len(made) > 1:
        parts = list(made.values())
        made[provider.name] = lambda: itertools.chain.from_iterable(part() for part in parts)
    return made


def _converted(
    cfg: DatasetConfig, task: seqio.Task, converter: Any, num_batches: int | None
) -> tf.data.Dataset:
    """The converted examples of one task, as many as `num_batches` may hold."""
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
    return converter(token_tables.dataset_of([table]), cfg.task_feature_lengths)
