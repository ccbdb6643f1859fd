"""The mixture that streams examples of several tasks in the order that a sampler draws.

SeqIO passes a `sample_fn` neither the batch size nor the number of hosts, and it shuffles across
the end of a pass, so an example could occur twice in one pass. `TaskMixture` therefore builds an
endless stream of each task's examples, in which every pass is a permutation that depends only on
(seed, run name, pass). A run sees the same examples in a grouped and a solo job, on one host and on
many.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from mpt_jax.batching.example_order import ExampleOrder
from mpt_jax.batching.samplers import (
    EqualQuotas,
    LastOfEach,
    PerExample,
    Sampler,
    StochasticTasks,
)
from mpt_jax.core.comparison import abbreviate
from mpt_jax.core.runs import data_name
from mpt_jax.data.classes import is_image_task
from mpt_jax.data.preprocessors import task_id
from mpt_jax.data.task_lookup import find_task, import_suites
from mpt_jax.data.token_tables import ExampleTable, TokenTable, joined_lookup, read_table

__all__ = [  # gin files name the samplers of this module
    "EqualQuotas",
    "LastOfEach",
    "PerExample",
    "Sampler",
    "StochasticTasks",
    "TaskMixture",
    "equal_shares",
    "has_equal_shares",
    "report_exposure",
    "task_mixture",
]

MANY_EPOCHS = 50  # passes over a task's examples that deserve a warning
# T5's cap on the size of a task in examples-proportional mixing.
T5_CAP = 2**18


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
        ValueError: a task is unknown, `rates` does not have exactly the tasks, `rates` or `cap` is
            not positive or would have no effect, or the sampler does not support this number of
            tasks.
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
                "rates must have one weight for each of the tasks "
                f"{', '.join(sorted(task_names))}, got weights for {', '.join(sorted(rates))}. "
                "Correct sampling.task_mixture.rates."
            )
        sampler.check(len(tasks))
        _check_weights(rates, cap, sampler.ignores_weights(len(tasks)))
        super().__init__(name, tasks, default_rate=1.0)
        self.sampler = sampler
        self.task_names = tuple(task_names)
        self.overlong: dict[str, tuple[int, int]] = {}
        self._shares = np.zeros(0)  # of the training examples; set with `overlong`
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
        """Returns this host's endless stream of examples; with `num_epochs`, SeqIO's dataset.

        The stream sets `overlong` to {task: (truncated examples, all examples)}.

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
        tables = self.read(split, seed=seed, **arguments)
        sizes = np.array([table.num_examples for table in tables])
        hosts = shard_info or seqio.ShardInfo(index=0, num_shards=1)
        # Streams of indices into the joined tables, so that examples are looked up only once.
        firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        # Augmentation needs the pass, so it is added to the indices of images.
        stride = int(sizes.sum()) if is_image_task(find_task(self.task_names[0])) else 0
        streams = [
            table.indices(self.sampler.seed, shuffle, stride).map(
                tf.autograph.experimental.do_not_convert(lambda index, first=first: first + index)
            )
            for table, first in zip(tables, firsts, strict=True)
        ]
        sampler = dataclasses.replace(
            self.sampler, num_hosts=hosts.num_shards, host_index=hosts.index
        )
        mixed = _mixed(streams, sampler, self.weights(sizes))
        example_at = tf.autograph.experimental.do_not_convert(joined_lookup(tables, stride))
        return mixed.map(example_at, num_parallel_calls=tf.data.AUTOTUNE)

    def read(self, split: str, seed: int | None, **settings: Any) -> list[ExampleTable]:
        """Returns the token table of each task; see `get_dataset` for what is set and raised.

        Args:
            split, seed: the split, and the seed of `DatasetConfig`.
            settings: see `token_tables.read_table`.
        """
        if seed is not None and seed != self.sampler.seed:
            raise ValueError(
                f"DatasetConfig.seed is {seed}, but the sampler of {self.name!r} has the seed "
                f"{self.sampler.seed}. Bind both to the same macro, such as RANDOM_SEED. (T5X "
                "replaces a seed of None with the time.)"
            )
        tables = [
            read_table(find_task(name), split, seed=self.sampler.seed, **settings)
            for name in self.task_names
        ]
        self.overlong = {t.name: (t.num_overlong, t.num_examples) for t in tables}
        weights = self.weights(np.array([table.num_examples for table in tables]))
        self.sampler.check(len(tables))
        self._shares = self.sampler.expected_shares(weights)
        self._log_shares(weights)
        return tables

    def order(self, tables: Sequence[TokenTable], shuffle: bool) -> ExampleOrder:
        """Returns the endless order of the examples of the tasks' tables."""
        sizes = np.array([table.num_examples for table in tables])
        streams = [task_id(data_name(table.name)) for table in tables]
        return ExampleOrder(self.sampler, self.weights(sizes), sizes, streams, shuffle)

    def weights(self, sizes: np.ndarray) -> np.ndarray:
        """Returns the mixing weights [K] of tasks with `sizes` [K] examples."""
        if self._rates is None:
            return np.minimum(sizes, self._cap).astype(np.float64)
        return np.array([self._rates[name] for name in self.task_names], np.float64)

    def exposure(self, steps: int) -> dict[str, dict[str, float]]:
        """Returns {task: {'share': its expected share of the training examples, 'epochs': passes
        over its examples in `steps` steps}}; {} before the examples are read. Packed batches hold
        more examples, so their tasks are passed more often.
        """
        if not self.overlong:
            return {}
        sizes = np.array([self.overlong[name][1] for name in self.task_names])
        epochs = steps * self.sampler.batch_size * self._shares / sizes
        return {
            name: {"share": share, "epochs": number}
            for name, share, number in zip(
                self.task_names, self._shares.tolist(), epochs.tolist(), strict=True
            )
        }

    def _log_shares(self, weights: np.ndarray) -> None:
        """Logs the expected share of each task, unless the sampler gives all tasks equal shares."""
        if len(weights) == 1 or isinstance(self.sampler, EqualQuotas):
            return
        parts = weights / weights.sum()
        shares = [
            f"{name} {share:.2f} ({part:.2f})"
            for name, share, part in zip(self.task_names, self._shares, parts, strict=True)
        ]
        logging.info(
            "Expected share of each task in the training examples (in parentheses, its share of "
            "the mixing weights): %s.",
            abbreviate(shares),
        )


def _mixed(streams: Sequence[Any], sampler: Sampler, weights: np.ndarray) -> tf.data.Dataset:
    """Returns the elements of endless streams in the order that a sampler draws, for its host."""

    def draw(step: tf.Tensor) -> tf.Tensor:
        # Stateless, because tf.data cannot save the position of a stateful function.
        tasks = tf.numpy_function(
            lambda number: sampler.draw(number[None], weights)[0], [step], tf.int64, stateful=False
        )
        tasks.set_shape([sampler.batch_size])
        return tasks

    steps = tf.data.Dataset.range(np.iinfo(np.int64).max)
    choices = steps.map(tf.autograph.experimental.do_not_convert(draw)).unbatch()
    mixed = tf.data.Dataset.choose_from_datasets(list(streams), choices)
    return mixed.shard(sampler.num_hosts, sampler.host_index) if sampler.num_hosts > 1 else mixed


def report_exposure(provider: Any, steps: int, shared: bool) -> dict[str, dict[str, float]]:
    """Returns `TaskMixture.exposure` of a mixture, and logs the passes over each task's examples.
    Tasks that share a prompt and pass more than `MANY_EPOCHS` times get a warning.

    Args:
        provider: the task or mixture of the training data, already read.
        steps: the number of training steps.
        shared: whether tasks share prompts.

    Returns:
        The exposure; {} if `provider` is not a `TaskMixture`.
    """
    exposure = provider.exposure(steps) if isinstance(provider, TaskMixture) else {}
    epochs = {name: found["epochs"] for name, found in exposure.items()}
    if epochs:
        shown = abbreviate([f"{name} {number:.1f}" for name, number in epochs.items()])
        logging.info("Passes over each task's training examples in %d steps: %s.", steps, shown)
    many = [f"{name} {number:.0f}" for name, number in epochs.items() if number > MANY_EPOCHS]
    if many and shared:
        sampler, other = provider.sampler, ""
        if isinstance(sampler, StochasticTasks) and not sampler.replacement:
            other = (
                ", or set sampling.StochasticTasks.replacement to True, which draws tasks in "
                "proportion to their mixing weights"
            )
        logging.warning(
            "Training would pass more than %d times over the examples of some tasks: %s. Lower "
            "TRAIN_STEPS%s.",
            MANY_EPOCHS,
            abbreviate(many),
            other,
        )
    return exposure


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
        task_names, sampler, rates, cap: see `TaskMixture`. Without a sampler, rates and cap must
            have their defaults.
        name: name of the mixture; None derives it from the arguments.
        modules: the modules that register the tasks; imported first.

    Raises:
        ValueError: a module or task is unknown, a different mixture has this name, or as in
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
        _check_weights(rates, cap, "a mixture without a sampler, for evaluation, has equal rates")
        mixture = seqio.Mixture(name, tasks, default_rate=1.0)
    else:
        mixture = TaskMixture(name, task_names, sampler, rates, cap)
    mixture.content = content  # type: ignore[attr-defined]
    seqio.MixtureRegistry.add_provider(name, mixture)
    return name


def _check_weights(rates: Mapping[str, float] | None, cap: int, ignored: str | None) -> None:
    """Checks that mixing weights are positive and have an effect.

    Args:
        rates, cap: see `TaskMixture`.
        ignored: why mixing weights have no effect; None if they have one.

    Raises:
        ValueError: the weights are not positive, or have no effect.
    """
    refused = [
        ("rates", rates, rates is not None, ignored),
        ("cap", cap, cap != T5_CAP, ignored or (rates and "rates sets the mixing weights")),
    ]
    for name, value, is_set, reason in refused:
        if is_set and reason:
            raise ValueError(
                f"sampling.task_mixture.{name} = {value!r} would have no effect, because {reason}. "
                "Remove the binding, or, for several tasks, choose a SAMPLER that draws by mixing "
                "weight, such as sampling.PerExample."
            )
    invalid = {name: rate for name, rate in (rates or {}).items() if not 0 < rate < np.inf}
    if invalid or cap < 1:
        rates_given = ", ".join(f"{rate} for {name}" for name, rate in invalid.items())
        given = f"rates has {rates_given}" if invalid else f"cap is {cap}"
        raise ValueError(
            f"Mixing weights must be positive, but {given}. Correct sampling.task_mixture. To "
            "leave a task out, remove it from task_names."
        )
