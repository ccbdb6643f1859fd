"""Datasets, and batches as NumPy dictionaries that follow the batch contract (`feature_converter`).

`DatasetConfig` and `get_dataset` have the same names and meaning as in T5X.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from mpt_jax.batching import bucketing
from mpt_jax.batching.bucketing import LengthBuckets
from mpt_jax.core.runs import unknown_name
from mpt_jax.data import table_batches, task_lookup, token_tables, validation
from mpt_jax.data.classes import is_image_task
from mpt_jax.data.feature_converter import PromptFeatureConverter
from mpt_jax.data.iterators import (
    DatasetSource,
    HostShard,
    Source,
    TableSource,
    TrainIterator,
)
from mpt_jax.data.preprocessors import TASK_IDS
from mpt_jax.data.sampling import TaskMixture, equal_shares, task_mixture

STANDARD_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass
class DatasetConfig:
    """Settings of a dataset: tasks, split, length limits and batch size. Most fields are T5X's.

    Attributes:
        mixture_or_task_name: the name of a registered task or mixture, or a SeqIO task or mixture.
        task_feature_lengths: limits on `inputs` and `targets` in tokens, including EOS but not
            prompt positions. None, for inference evaluation only, means the longest lengths that
            occur.
        split: the split to read from every task.
        batch_size: rows per step over all hosts.
        shuffle: whether each pass has a different order.
        seed: seed of shuffling and sampling; required for training.
        use_cached: whether to read SeqIO's offline cache.
        pack: whether to pack several examples into a row.
        use_custom_packing_ops: SeqIO's packing option; see `PromptFeatureConverter`.
        module: the module that registers the tasks; imported first.
        use_memory_cache: whether SeqIO keeps evaluation examples in memory between evaluations.
        trim_output_features: whether SeqIO trims examples, which `preprocessors.end_and_limit` has
            already truncated.
        length_buckets: {'inputs': [...], 'targets': [...]}, token limits below those of
            `task_feature_lengths`. Each unpacked batch is trimmed to the smallest limits that fit
            it, which changes results only by rounding (and, with dropout, the masks drawn). {}
            gives all batches one length; None gives default lengths (`bucketing.automatic`). Not a
            field of T5X.
        by_length: whether to sort the examples of a few training batches at a time by length, so
            that more padding is trimmed. This changes which examples share a batch. Not a field
            of T5X.

    Raises:
        ValueError: `batch_size` is not positive, or `length_buckets` or `by_length` would have no
            effect.
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
            raise ValueError(
                f"DatasetConfig.batch_size must be positive, got {self.batch_size}. Correct "
                "BATCH_SIZE (for evaluation, EVAL_BATCH_SIZE)."
            )
        if self.pack and (self.length_buckets or self.by_length):
            raise ValueError(
                "DatasetConfig.length_buckets and by_length have no effect with pack = True, "
                "because packed rows have one length. Set pack = False (omit gin/runs/packed.gin), "
                "or leave length_buckets and by_length at their defaults (omit "
                "gin/runs/by_length.gin)."
            )

    def provider(self) -> Any:
        """Returns the SeqIO task or mixture. Raises ValueError if its name or module is unknown."""
        task_lookup.import_suites([self.module] if self.module else [])
        name = self.mixture_or_task_name
        if not isinstance(name, str):
            return name
        if name not in seqio.MixtureRegistry.names() and not task_lookup.is_task(name):
            known = sorted(seqio.TaskRegistry.names() | seqio.MixtureRegistry.names())
            raise ValueError(
                f"{unknown_name('task or mixture', name, known)} Correct the name, or add the "
                "module that registers it to TASK_MODULES."
            )
        return seqio.get_mixture_or_task(name)

    def converter(self, feature_converter_cls: Callable[..., Any], pack: bool) -> Any:
        """Returns the feature converter, built as T5X builds it."""
        if not pack:
            return feature_converter_cls(pack=False)
        return feature_converter_cls(pack=True, use_custom_packing_ops=self.use_custom_packing_ops)

    def reading(self) -> dict[str, Any]:
        """Returns the settings with which tasks are read."""
        return {
            "sequence_length": dict(self.task_feature_lengths or {}),
            "use_cached": self.use_cached,
            "seed": self.seed,
            "trim_output_features": self.trim_output_features,
        }

    def buckets(
        self, converter: Any, limits: Mapping[str, int] | None = None
    ) -> LengthBuckets | None:
        """Returns the lengths that batches are trimmed to, or None if all batches have one length.

        Args:
            converter: the feature converter.
            limits: the limits to use if `task_feature_lengths` is None.
        """
        limits = self.task_feature_lengths or limits
        prompt_length = getattr(converter, "prompt_length", None)
        if limits is None or self.pack or prompt_length is None:
            return None
        settings = self.length_buckets
        settings = bucketing.automatic(limits) if settings is None else settings
        return bucketing.of_settings(settings, prompt_length, limits) if settings else None


def with_split(cfg: DatasetConfig) -> tuple[DatasetConfig | None, tuple[str, ...]]:
    """Restricts a dataset to the tasks that have its split, for evaluations during training.

    Returns:
        The restricted settings, or None if no task has the split; and the names of the tasks that
        lack it. If all tasks lack a split that is not one of `STANDARD_SPLITS`, its name may be
        misspelled, so the settings are returned unchanged, and reading the data raises an error.
    """
    absent, names = [], []
    for task in seqio.get_subtasks(cfg.provider()):
        with task_lookup.explain_missing_data(task, cfg.split):
            splits = task.source.splits
        names.append(task.name)
        if splits and cfg.split not in splits:  # TFDS has no splits before data is prepared
            absent.append(task.name)
    kept = [name for name in names if name not in absent]
    if not absent or (not kept and cfg.split not in STANDARD_SPLITS):
        return cfg, ()
    if not kept:
        return None, tuple(absent)
    return dataclasses.replace(cfg, mixture_or_task_name=task_mixture(kept)), tuple(absent)


def get_dataset(
    cfg: DatasetConfig,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Callable[..., Any],
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = False,
) -> tf.data.Dataset:
    """Returns one host's shard of the batches, like T5X's `get_dataset`.

    Args:
        cfg: the settings of the dataset.
        shard_id: index of this host.
        num_shards: number of hosts.
        feature_converter_cls: the class or factory of the feature converter, called with `pack`
            and, when packing, `use_custom_packing_ops`.
        num_epochs: number of passes; None for an endless dataset.
        continue_from_last_checkpoint: T5X's argument; must be False, since
            `TrainIterator.restore` restores data positions.

    Raises:
        ValueError: a task, run, split, seed, batch size or length is invalid.
    """
    if continue_from_last_checkpoint:
        raise ValueError(
            "continue_from_last_checkpoint must be False, because get_dataset always starts at the "
            "first batch. Use TrainIterator.restore to restore a data position."
        )
    provider, converter = cfg.provider(), cfg.converter(feature_converter_cls, cfg.pack)
    return _batches(cfg, provider, converter, seqio.ShardInfo(shard_id, num_shards), num_epochs)


def _batches(
    cfg: DatasetConfig,
    provider: Any,
    converter: Any,
    shard: seqio.ShardInfo,
    num_epochs: int | None,
) -> tf.data.Dataset:
    """Returns one shard of the batches of a task or mixture; the arguments are `get_dataset`'s."""
    hosts = shard.num_shards
    validation.check_config(cfg, provider, converter, hosts, endless=num_epochs is None)
    batch_size = cfg.batch_size // hosts
    dataset = provider.get_dataset(
        **cfg.reading(),
        split=cfg.split,
        shuffle=cfg.shuffle,
        num_epochs=num_epochs,
        shard_info=shard,
    )
    if cfg.by_length:
        dataset = by_length(dataset, batch_size, equal_shares(provider) or 1, cfg.seed or 0)
    dataset = converter(dataset, dict(cfg.task_feature_lengths or {}))
    dataset = dataset.batch(batch_size, drop_remainder=True)
    if isinstance(provider, TaskMixture):
        validation.check_lengths(provider.overlong, converter, cfg.task_feature_lengths)
    return dataset


def by_length(dataset: tf.data.Dataset, batch_size: int, shares: int, seed: int) -> tf.data.Dataset:
    """Sorts the examples of `bucketing.WINDOW` batches at a time by input length, and shuffles the
    resulting batches.

    If tasks have equal shares of each batch, each task's examples are sorted separately. The shares
    then stay equal, and a run of a grouped job sees the same examples per batch as in a solo job.

    Args:
        dataset: an endless dataset of task features (inputs, targets, task_ids).
        batch_size: B, the number of examples in a batch.
        shares: number of tasks with equal shares: each has B / shares contiguous examples of every
            batch, and their order is always the same. 1 if shares are not equal.
        seed: seed of the shuffling.
    """
    window, share = bucketing.WINDOW, batch_size // shares

    def to_shares(x: tf.Tensor) -> tf.Tensor:  # [window * B] -> [shares, window * share]
        x = tf.transpose(tf.reshape(x, [window, shares, share]), [1, 0, 2])
        return tf.reshape(x, [shares, window * share])

    def sort(number: tf.Tensor, features: Mapping[str, tf.RaggedTensor]):
        lengths = features["inputs"].row_lengths()  # type: ignore[union-attr]
        by_share = tf.argsort(to_shares(lengths), stable=True)
        order = tf.gather(to_shares(tf.range(window * batch_size)), by_share, batch_dims=1)
        order = tf.transpose(tf.reshape(order, [shares, window, share]), [1, 0, 2])
        key = token_tables.stream_key(seed, bucketing.STREAM, number)
        shuffled = tf.argsort(tf.random.stateless_uniform([window], key, alg="philox"))
        order = tf.reshape(tf.gather(order, shuffled), [-1])
        return {name: tf.gather(value, order) for name, value in features.items()}

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
    """Returns an endless iterator over this host's rows of the training batches.

    Args:
        cfg: the settings of the dataset.
        feature_converter_cls: as for `get_dataset`.
        num_hosts: number of hosts that share each batch.
        host_index: index of this host.

    Raises:
        ValueError: as in `get_dataset`, or `batch_size` is not a multiple of `num_hosts`.
    """
    share = HostShard(cfg.batch_size, num_hosts, host_index)
    provider, converter = cfg.provider(), cfg.converter(feature_converter_cls, cfg.pack)
    source: Source
    if _has_tables(provider, converter):
        source, shapes = _of_tables(cfg, provider, converter, share)
    else:
        source, shapes = _of_dataset(cfg, provider, converter, share)
    identity = {
        "tasks": [task.name for task in seqio.get_subtasks(provider)],
        "sampler": repr(getattr(provider, "sampler", None)),
        "split": cfg.split,
        "seed": cfg.seed,
        "shuffle": cfg.shuffle,
        "features": shapes,
        "by_length": cfg.by_length,
        "pack_window": getattr(converter, "pack_window", None) if cfg.pack else None,
    }
    return TrainIterator(source, share, identity, getattr(converter, "prompt_length", 0))


def _of_tables(
    cfg: DatasetConfig, mixture: TaskMixture, converter: PromptFeatureConverter, share: HostShard
) -> tuple[Source, dict[str, list[int]]]:
    """Returns the batches of a mixture of texts, and the shapes of their features."""
    validation.check_config(cfg, mixture, converter, share.num_hosts, endless=True)
    tables = mixture.read(**cfg.reading(), split=cfg.split)
    limits = dict(cfg.task_feature_lengths or {})
    validation.check_lengths(mixture.overlong, converter, limits)
    buckets = cfg.buckets(converter)
    batches = table_batches.of_mixture(mixture, tables, cfg, converter, buckets, share)
    lengths = converter.get_model_feature_lengths(limits)
    return TableSource(batches), {x: [cfg.batch_size, n] for x, n in sorted(lengths.items())}


def _of_dataset(
    cfg: DatasetConfig, provider: Any, converter: Any, share: HostShard
) -> tuple[Source, dict[str, list[int | None]]]:
    """Returns the batches of any task or mixture, and the shapes of their features."""
    # Every host makes whole batches, so that a batch does not depend on the number of hosts.
    dataset = _batches(cfg, provider, converter, seqio.ShardInfo(0, 1), num_epochs=None)
    options = tf.data.Options()
    options.deterministic = True
    # Prefetched batches are saved with the data position, except those of images, which are large:
    # their position is counts, from which the same batches are made again.
    is_image = map(is_image_task, seqio.get_subtasks(provider))
    if isinstance(provider, TaskMixture) and all(is_image):
        options.experimental_symbolic_checkpoint = True
    # Steps take milliseconds to seconds, so two prefetched batches suffice.
    dataset = dataset.prefetch(2).with_options(options)
    shapes = {name: list(spec.shape) for name, spec in sorted(dataset.element_spec.items())}
    return DatasetSource(dataset, share, cfg.buckets(converter)), shapes


def _has_tables(provider: Any, converter: Any) -> bool:
    """Whether batches are made from token tables: those of a `TaskMixture` of texts."""
    if not isinstance(provider, TaskMixture) or type(converter) is not PromptFeatureConverter:
        return False
    return not any(is_image_task(task) for task in seqio.get_subtasks(provider))
