"""From a `DatasetConfig` to batches: NumPy dictionaries in the contract of `features`.

The training iterator's position can be taken at any step and set again, exactly: what tf.data has
prefetched but not handed out is part of it. `DatasetConfig` and `get_dataset` are T5X's by name
and meaning.
"""

import dataclasses
import io
import itertools
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from mpt_jax import examples
from mpt_jax.runs import unknown_name
from mpt_jax.sampling import TaskMixture

Batch = dict[str, np.ndarray]
_POSITION = "position.json"


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

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"DatasetConfig.batch_size must be positive, got {self.batch_size}.")

    def provider(self) -> Any:
        """Returns the SeqIO task or mixture; raises ValueError listing the known ones."""
        examples.import_suites([self.module] if self.module else [])
        name = self.mixture_or_task_name
        if not isinstance(name, str):
            return name
        if name not in seqio.MixtureRegistry.names() and not examples.is_task(name):
            known = sorted(seqio.TaskRegistry.names() | seqio.MixtureRegistry.names())
            raise ValueError(unknown_name("task or mixture", name, known))
        return seqio.get_mixture_or_task(name)

    def converter(self, feature_converter_cls: Callable[..., Any], pack: bool) -> Any:
        """Returns the feature converter, built as T5X builds it."""
        if not pack:
            return feature_converter_cls(pack=False)
        return feature_converter_cls(pack=True, use_custom_packing_ops=self.use_custom_packing_ops)


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
    _check(cfg, provider, converter, num_shards, endless=num_epochs is None)
    dataset = seqio.get_dataset(
        provider,
        task_feature_lengths=dict(cfg.task_feature_lengths or {}),
        feature_converter=converter,
        dataset_split=cfg.split,
        use_cached=cfg.use_cached,
        shuffle=cfg.shuffle,
        num_epochs=num_epochs,
        shard_info=seqio.ShardInfo(index=shard_id, num_shards=num_shards),
        verbose=False,
        seed=cfg.seed,
        batch_size=cfg.batch_size // num_shards,
        trim_output_features=cfg.trim_output_features,
    )
    if isinstance(provider, TaskMixture):
        check_lengths(provider.overlong, converter, cfg.task_feature_lengths)
    return dataset


def _check(cfg: DatasetConfig, provider: Any, converter: Any, hosts: int, endless: bool) -> None:
    """Raises ValueError for what would fail, or be wrong, later and less clearly."""
    if cfg.batch_size % hosts:
        raise ValueError(
            f"DatasetConfig.batch_size {cfg.batch_size} must be a multiple of the {hosts} hosts."
        )
    if cfg.task_feature_lengths is None:
        raise ValueError("DatasetConfig.task_feature_lengths must be given for training.")
    if endless and cfg.seed is None:
        raise ValueError("DatasetConfig.seed must be given for training; there is no default.")
    if endless and isinstance(provider, TaskMixture):
        sampler = provider.sampler
        if sampler.batch_size != cfg.batch_size and not cfg.pack:
            raise ValueError(
                f"DatasetConfig.batch_size is {cfg.batch_size}, but the sampler's is "
                f"{sampler.batch_size}. Bind both to one macro."
            )
    tasks = seqio.get_subtasks(provider)
    if isinstance(provider, seqio.Task):
        examples.check_split(provider, cfg.split)
    elif not any(cfg.split in task.splits for task in tasks):
        raise ValueError(f"No task of mixture {provider.name!r} has a {cfg.split!r} split.")
    check_runs(tasks, converter)


def check_runs(tasks: Iterable[Any], converter: Any) -> None:
    """Raises ValueError for a task that is not among the converter's runs."""
    # Converters other than ours (plain T5 fine-tuning under T5X's gin) know no runs.
    runs = getattr(converter, "runs", None)
    if runs is not None:
        for task in tasks:
            runs.row(task.name)


def check_lengths(
    overlong: Mapping[str, tuple[int, int]],
    converter: Any,
    task_feature_lengths: Mapping[str, int] | None,
) -> None:
    """Raises ValueError for over-long examples unless the converter truncates them.

    Args:
        overlong: {task: (examples that were cut, examples)}.
        converter: its `on_overlong` says what follows.
        task_feature_lengths: the limits, for the message.
    """
    cut = {name: counts for name, counts in overlong.items() if counts[0]}
    if not cut or getattr(converter, "on_overlong", "truncate") == "truncate":
        return
    counts = ", ".join(f"{n}: {c} of {total} ({c / total:.2%})" for n, (c, total) in cut.items())
    raise ValueError(
        f"Some examples are longer than task_feature_lengths {dict(task_feature_lengths or {})} "
        f"({counts}). Raise the limits, or bind PromptFeatureConverter.on_overlong = 'truncate'."
    )


def check_counts(
    overlong: Mapping[str, tuple[int, int]], cfg: DatasetConfig, converter: Any
) -> None:
    """Raises ValueError for an empty split, or as `check_lengths` does; logs what is cut.

    Args:
        overlong: {task: (examples that were cut, examples)}.
        cfg: what was read.
        converter: see `check_lengths`.
    """
    empty = [name for name, (_, size) in overlong.items() if not size]
    if empty:
        raise ValueError(f"The {cfg.split!r} split is empty: {', '.join(empty)}.")
    examples.report_lengths(overlong, cfg.split, cfg.task_feature_lengths)
    check_lengths(overlong, converter, cfg.task_feature_lengths)


class TrainIterator(Iterator[Batch]):
    """This host's rows of the training batches, with a position that can be saved.

    Every host makes whole batches and keeps its own rows of them. So the batch of a step does not
    depend on the number of hosts, and a position that was saved by one number of hosts is good
    for any other.

    Args:
        dataset: whole batches.
        share: which rows of them are this host's.
        identity: JSON values that a position must agree on with the iterator it is restored to.
    """

    def __init__(self, dataset: tf.data.Dataset, share: "Share", identity: Mapping[str, Any]):
        self._iterator = iter(dataset)
        self._share = share
        self._checkpoint = tf.train.Checkpoint(iterator=self._iterator)
        self._identity = json.loads(json.dumps(dict(identity)))
        self._taken = 0
        self._reported = False

    def __next__(self) -> Batch:
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._taken:
                raise
            raise ValueError(
                f"There is not one whole batch in {self._identity}: the split is empty, or holds "
                "fewer examples than a batch."
            ) from None
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(plain_message(error)) from error
        self._taken += 1
        return self._share.of({name: value.numpy() for name, value in batch.items()})

    def state(self) -> bytes:
        """Returns the position: restoring it continues with the batch that would come next."""
        content = io.BytesIO()
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(content, "w") as archive:
            self._checkpoint.write(os.path.join(folder, "position"))
            header = {"identity": self._identity, "batches_taken": self._taken}
            archive.writestr(_POSITION, json.dumps(header))
            for name in sorted(os.listdir(folder)):
                archive.write(os.path.join(folder, name), name)
        if not self._reported:
            logging.info("The data position takes %.1f KB.", len(content.getvalue()) / 1000)
            self._reported = True
        return content.getvalue()

    def restore(self, state: bytes) -> None:
        """Goes to a position returned by `state`.

        Raises:
            ValueError: `state` is no position, or one of another configuration.
        """
        try:
            archive = zipfile.ZipFile(io.BytesIO(state))
            header = json.loads(archive.read(_POSITION))
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ValueError(f"Not a data position, or a damaged one: {error}") from error
        theirs = header["identity"]
        differing = {
            key: (theirs.get(key), value)
            for key, value in self._identity.items()
            if theirs.get(key) != value
        }
        if differing:
            text = "; ".join(f"{k}: saved {a!r}, now {b!r}" for k, (a, b) in differing.items())
            raise ValueError(f"The data position belongs to another configuration: {text}.")
        with tempfile.TemporaryDirectory() as folder:
            for name in archive.namelist():
                if name != _POSITION:
                    with open(os.path.join(folder, os.path.basename(name)), "wb") as file:
                        file.write(archive.read(name))
            self._checkpoint.read(os.path.join(folder, "position")).assert_consumed()
        self._taken = header["batches_taken"]


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
    share = Share(cfg.batch_size, num_hosts, host_index)
    dataset = get_dataset(cfg, 0, 1, feature_converter_cls)
    options = tf.data.Options()
    options.deterministic = True
    # Models here take milliseconds to seconds a step: a few batches ahead suffice, and each one
    # more is saved with the position.
    dataset = dataset.prefetch(2).with_options(options)
    provider = cfg.provider()
    sampler = getattr(provider, "sampler", None)
    identity = {
        "tasks": [task.name for task in seqio.get_subtasks(provider)],
        "sampler": repr(sampler),
        "split": cfg.split,
        "seed": cfg.seed,
        "shuffle": cfg.shuffle,
        "features": {name: list(s.shape) for name, s in sorted(dataset.element_spec.items())},
    }
    return TrainIterator(dataset, share, identity)


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
    check_runs(tasks, converter)
    share = Share(cfg.batch_size, num_hosts, host_index)
    made: dict[str, Callable[[], Iterable[Batch]]] = {}
    for task in tasks:
        if cfg.split not in task.splits and not isinstance(provider, seqio.Task):
            logging.warning("Task %s has no %r split: no loss on it.", task.name, cfg.split)
            continue
        dataset = _converted(cfg, task, converter, num_batches)
        made[task.name] = Batches(dataset.batch(cfg.batch_size), share, keep=cfg.use_memory_cache)
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
    table = examples.read_table(
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
    check_lengths(counts, converter, cfg.task_feature_lengths)
    return converter(examples.dataset_of([table]), cfg.task_feature_lengths)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which rows of a batch of `batch_size` belong to this host."""

    batch_size: int
    num_hosts: int
    host_index: int

    def __post_init__(self):
        if self.batch_size % self.num_hosts:
            raise ValueError(
                f"DatasetConfig.batch_size {self.batch_size} must be a multiple of the "
                f"{self.num_hosts} hosts."
            )

    def of(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Fills the batch up with rows of zeros and returns this host's rows."""
        rows = self.batch_size // self.num_hosts
        first = rows * self.host_index
        return {name: fill(x, self.batch_size)[first : first + rows] for name, x in batch.items()}


class Batches:
    """Batches that can be gone through any number of times."""

    def __init__(self, dataset: tf.data.Dataset, share: Share, keep: bool):
        self._dataset, self._share, self._keep = dataset, share, keep
        self._kept: list[Batch] | None = None

    def __call__(self) -> Iterable[Batch]:
        if not self._keep:
            return self._read()
        if self._kept is None:
            self._kept = list(self._read())
        return self._kept

    def _read(self) -> Iterator[Batch]:
        for batch in self._dataset.as_numpy_iterator():
            yield self._share.of(dict(batch))


def fill(array: np.ndarray, rows: int) -> np.ndarray:
    """Returns `array` with zeros appended along its first axis, up to `rows`."""
    missing = rows - array.shape[0]
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array


def plain_message(error: tf.errors.InvalidArgumentError) -> str:
    """Returns what an assertion of ours in the graph says, without what TensorFlow puts around."""
    found = re.search(r"assertion failed: \[(.*?)\]\s*\n", str(error), re.DOTALL)
    return found.group(1) if found else str(error)
