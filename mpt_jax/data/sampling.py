"""Samplers, which choose the tasks in each batch, and the mixture that streams their examples.

A sampler draws the task of each of the B examples of a batch. The draws depend only on the seed and
the step and are made for the global batch, so all hosts agree on them. The examples are then dealt
to the hosts in turn.

A sampler has the interface of a SeqIO `sample_fn`, but it mixes unsharded, endless streams. SeqIO
passes a `sample_fn` neither the batch size nor the number of hosts, and it shuffles across the end
of a pass, so an example could occur twice in one pass. `TaskMixture` therefore builds an endless
stream of each task's examples, in which every pass is a permutation that depends only on (seed, run
name, pass). A run sees the same examples in a grouped and a solo job, on one host and on many.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mpt_jax.data.task_lookup import find_task, import_suites
from mpt_jax.data.token_tables import joined_lookup, read_table, stream_key

# T5's cap on the size of a task in examples-proportional mixing.
T5_CAP = 2**18
_DRAWS = zlib.crc32(b"mpt_jax.sampling") & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Base class of samplers. Subclasses implement `draw`.

    Attributes:
        batch_size: B, the number of examples (not packed rows) per step over all hosts.
        seed: seed of all draws, 0 .. 2^31 - 1.
        num_hosts: number of hosts that the batch is dealt to; must divide `batch_size`.
        host_index: index of this host.

    Raises:
        ValueError: `batch_size` or `seed` is out of range.
    """

    batch_size: int
    seed: int
    num_hosts: int = 1
    host_index: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % self.num_hosts:
            raise ValueError(
                f"{type(self).__name__}.batch_size must be a positive multiple of the number of "
                f"hosts ({self.num_hosts}), got {self.batch_size}. Correct BATCH_SIZE."
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(
                f"{type(self).__name__}.seed must be from 0 to 2^31 - 1, got {self.seed}. Correct "
                "RANDOM_SEED."
            )

    def check(self, num_tasks: int) -> None:
        """Raises ValueError if this sampler does not support `num_tasks` tasks."""

    def draw(self, step: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
        """Returns the task indices [B] of the examples of the global batch at `step`.

        Args:
            step: the step, a scalar int64.
            weights: the positive mixing weights [K] of the tasks; they need not sum to 1.
        """
        raise NotImplementedError

    def __call__(
        self, streams: Sequence[tf.data.Dataset], rates: Sequence[float], seed: int | None = None
    ) -> tf.data.Dataset:
        """Interleaves endless, unsharded `streams` and returns this host's shard of the result."""
        del seed  # The sampler's is always set and equal on all hosts; SeqIO's may be neither.
        weights = np.asarray(rates, np.float64)
        if not (weights > 0).all():
            raise ValueError(
                f"Mixing weights must be positive, got {weights.tolist()}. Correct rates or cap of "
                "sampling.task_mixture. To leave a task out, remove it from task_names."
            )
        self.check(len(streams))
        draw = tf.autograph.experimental.do_not_convert(lambda step: self.draw(step, weights))
        choices = tf.data.Dataset.range(np.iinfo(np.int64).max).map(draw).unbatch()
        mixed = tf.data.Dataset.choose_from_datasets(streams, choices)
        return mixed.shard(self.num_hosts, self.host_index) if self.num_hosts > 1 else mixed

    def _uniform(self, step: tf.Tensor, count: int) -> tf.Tensor:
        """Returns `count` float64 values drawn uniformly from [0, 1) for `step`."""
        return tf.random.stateless_uniform(
            [count], stream_key(self.seed, _DRAWS, step), dtype=tf.float64, alg="philox"
        )


@dataclasses.dataclass(frozen=True)
class StochasticTasks(Sampler):
    """Stochastic task sampling (arXiv 2303.02861, section 3.2): each batch has k random tasks.

    k is drawn uniformly from 2 .. kappa. Then k tasks are drawn without replacement by mixing
    weight (Gumbel top-k). Each supplies B // k examples, and the first B mod k tasks drawn supply
    one more. The paper does not say how a batch is divided; this division is this library's choice.

    Attributes:
        kappa: the maximum number of tasks in one batch; None for all.
        replacement: whether to draw tasks with replacement, and to take the remaining B mod k
            examples from one of the drawn tasks at random, as the authors' released loader does. A
            batch may then contain a single task.
    """

    kappa: int | None = None
    replacement: bool = False

    def check(self, num_tasks: int) -> None:
        kappa = self._kappa(num_tasks)
        if not 2 <= kappa <= num_tasks:
            raise ValueError(
                "Stochastic task sampling needs kappa from 2 to the number of tasks "
                f"({num_tasks}), but kappa is {kappa}. Change StochasticTasks.kappa, or for one "
                "task use sampling.EqualQuotas as the SAMPLER."
            )
        if self.batch_size < kappa:
            raise ValueError(
                f"A batch of {self.batch_size} examples cannot hold kappa = {kappa} tasks. Raise "
                "BATCH_SIZE, or lower StochasticTasks.kappa."
            )

    def draw(self, step: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
        kappa = self._kappa(len(weights))
        uniform = self._uniform(step, 2 + max(kappa, len(weights)))
        count = 2 + tf.cast(uniform[0] * (kappa - 1), tf.int32)
        batch_size = tf.constant(self.batch_size)
        quota, rest = batch_size // count, tf.math.floormod(batch_size, count)
        if self.replacement:
            tasks = _categorical(weights, uniform[2 : 2 + kappa])[:count]
            lucky = tf.cast(uniform[1] * tf.cast(count, tf.float64), tf.int32)
            extra = rest * tf.one_hot(lucky, count, dtype=tf.int32)
        else:
            scores = np.log(weights) - tf.math.log(-tf.math.log(uniform[2 : 2 + len(weights)]))
            tasks = tf.argsort(scores, direction="DESCENDING")[:count]
            extra = tf.cast(tf.range(count) < rest, tf.int32)
        return tf.cast(tf.repeat(tasks, quota + extra), tf.int64)

    def _kappa(self, num_tasks: int) -> int:
        return num_tasks if self.kappa is None else self.kappa


@dataclasses.dataclass(frozen=True)
class PerExample(Sampler):
    """Draws each example's task independently by mixing weight (the fixed-mixture ablation)."""

    def draw(self, step: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
        tasks = _categorical(weights, self._uniform(step, self.batch_size))
        return tf.cast(tasks, tf.int64)


@dataclasses.dataclass(frozen=True)
class EqualQuotas(Sampler):
    """Takes B / K examples of each of the K tasks in every batch, for grouped jobs. Weights are
    ignored.

    Each run then sees the same examples at each step as in a solo job with a batch of B / K.
    """

    def check(self, num_tasks: int) -> None:
        if self.batch_size % num_tasks:
            raise ValueError(
                "EqualQuotas.batch_size must be a multiple of the number of runs "
                f"({num_tasks}), got {self.batch_size}. Use "
                f"{self.batch_size // num_tasks * num_tasks or num_tasks}, for example, by "
                "changing BATCH_SIZE."
            )

    def draw(self, step: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
        del step
        return tf.repeat(tf.range(len(weights), dtype=tf.int64), self.batch_size // len(weights))


class TaskMixture(seqio.Mixture):
    """Mixture whose training stream is drawn by a `Sampler`.

    Each task is preprocessed once and its tokens are kept in memory (4 bytes each), so use a plain
    `seqio.Mixture` for tasks with random preprocessors (span corruption). If the number of epochs
    is finite, as in evaluation, SeqIO reads the mixture like any other.

    Args:
        name: name of the mixture.
        task_names: names of registered SeqIO tasks.
        sampler: the sampler that draws the tasks of each batch.
        rates: mixing weight of each task; by default its number of examples, at most `cap`.
        cap: upper bound of the default weights.

    Raises:
        ValueError: a task is unknown, `rates` names other tasks, or the sampler does not support
            this number of tasks.
    """

    def __init__(
        self,
        name: str,
        task_names: Sequence[str],
        sampler: Sampler,
        rates: Mapping[str, float] | None = None,
        cap: int = T5_CAP,
    ):
        tasks = [find_task(task) for task in task_names]
        if rates is not None and set(rates) != set(task_names):
            raise ValueError(
                f"rates must have one weight for each of the tasks {sorted(task_names)}, got "
                f"weights for {sorted(rates)}. Correct sampling.task_mixture.rates."
            )
        sampler.check(len(tasks))
        super().__init__(name, tasks, default_rate=1.0)
        self.sampler = sampler
        self.task_names = tuple(task_names)
        self.overlong: dict[str, tuple[int, int]] = {}
        self._rates = rates
        self._cap = cap

    def get_dataset(  # type: ignore[override]  # what seqio.get_dataset passes
        self,
        sequence_length: Mapping[str, int] | None = None,
        split: str = "train",
        use_cached: bool = False,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        num_epochs: int | None = None,
        trim_output_features: bool = True,
        **evaluation_only: Any,
    ) -> tf.data.Dataset:
        """Returns this host's endless stream of examples.

        Sets `overlong` to {task: (truncated examples, all examples)}.

        Raises:
            ValueError: a task has no such split, no data on this machine or no examples in the
                split, or `seed` differs from the sampler's seed.
        """
        arguments: dict[str, Any] = dict(
            sequence_length=sequence_length,
            use_cached=use_cached,
            trim_output_features=trim_output_features,
        )
        if num_epochs is not None:
            return super().get_dataset(
                **arguments,
                split=split,
                shuffle=shuffle,
                seed=seed,
                shard_info=shard_info,
                num_epochs=num_epochs,
                **evaluation_only,
            )
        if seed is not None and seed != self.sampler.seed:
            raise ValueError(
                f"DatasetConfig.seed is {seed}, but the sampler of {self.name!r} has the seed "
                f"{self.sampler.seed}. Bind both to the same macro, such as RANDOM_SEED. (T5X "
                "replaces a seed of None with the time.)"
            )
        tables = [
            read_table(find_task(name), split, seed=self.sampler.seed, **arguments)
            for name in self.task_names
        ]
        self.overlong = {t.name: (t.num_overlong, t.num_examples) for t in tables}
        sizes = np.array([table.num_examples for table in tables])
        hosts = shard_info or seqio.ShardInfo(index=0, num_shards=1)
        sampler = dataclasses.replace(
            self.sampler, num_hosts=hosts.num_shards, host_index=hosts.index
        )
        # Streams of indices into the joined tables, so that examples are looked up only once.
        firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        streams = [
            table.indices(self.sampler.seed, shuffle).map(
                tf.autograph.experimental.do_not_convert(lambda index, first=first: first + index)
            )
            for table, first in zip(tables, firsts, strict=True)
        ]
        example_at = tf.autograph.experimental.do_not_convert(joined_lookup(tables))
        mixed = sampler(streams, self.weights(sizes).tolist())
        return mixed.map(example_at, num_parallel_calls=tf.data.AUTOTUNE)

    def weights(self, sizes: np.ndarray) -> np.ndarray:
        """Returns the mixing weights [K] of tasks with `sizes` [K] examples."""
        if self._rates is None:
            return np.minimum(sizes, self._cap).astype(np.float64)
        return np.array([self._rates[name] for name in self.task_names], np.float64)


def equal_shares(provider: Any) -> int | None:
    """Returns the number of tasks if all have equal, contiguous shares of every batch; otherwise
    None."""
    sampler = getattr(provider, "sampler", None)
    return len(provider.task_names) if isinstance(sampler, EqualQuotas) else None


def has_equal_shares(cfg: Any) -> bool:
    """Whether every batch of a `DatasetConfig` has equally many rows of each task, contiguously."""
    return equal_shares(cfg.provider()) is not None and not cfg.pack


def task_mixture(
    task_names: Sequence[str],
    sampler: Sampler | None = None,
    name: str | None = None,
    rates: Mapping[str, float] | None = None,
    cap: int = T5_CAP,
    modules: Sequence[str] = (),
) -> str:
    """Registers a mixture of tasks and returns its name, for `DatasetConfig` in gin.

    Without a sampler (for evaluation), the mixture is a plain one with equal rates. Gin may call
    this function repeatedly: the default name is derived from the arguments, so the same arguments
    return the same mixture.

    Args:
        task_names, sampler, rates, cap: see `TaskMixture`. Without a sampler, rates and cap have no
            effect.
        name: name of the mixture; None derives it from the arguments.
        modules: the modules that register the tasks; imported first.

    Raises:
        ValueError: a module or task is unknown, a different mixture has this name, or as
            `TaskMixture`.
    """
    import_suites(modules, task_names)
    content = repr((tuple(task_names), sampler, rates and sorted(rates.items()), cap))
    name = name or f"mixture_{zlib.crc32(content.encode()):08x}"
    if name in seqio.MixtureRegistry.names():
        if getattr(seqio.MixtureRegistry.get(name), "content", None) == content:
            return name
        raise ValueError(
            f"A different mixture is registered as {name!r}. Bind sampling.task_mixture.name to "
            "another name."
        )
    if sampler is None:
        tasks = [find_task(task) for task in task_names]
        mixture = seqio.Mixture(name, tasks, default_rate=1.0)
    else:
        mixture = TaskMixture(name, task_names, sampler, rates, cap)
    mixture.content = content  # type: ignore[attr-defined]
    seqio.MixtureRegistry.add_provider(name, mixture)
    return name


def _categorical(weights: np.ndarray, uniform: tf.Tensor) -> tf.Tensor:
    """Returns one index, drawn by `weights` [K], for each value of `uniform` from [0, 1)."""
    bounds = tf.constant(np.cumsum(weights)[:-1] / np.sum(weights))
    return tf.searchsorted(bounds, uniform, side="right")
