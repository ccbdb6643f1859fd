"""Samplers, which choose the tasks in each batch.

A sampler draws the task of each of the B examples of a batch. The draws depend only on the seed and
the step and are made for the global batch, so all hosts agree on them. The examples are then dealt
to the hosts in turn.

A sampler has the interface of a SeqIO `sample_fn`, but it mixes unsharded, endless streams.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from mpt_jax.data.token_tables import stream_key

SHARE_STEPS = 2000  # steps whose draws estimate the shares of tasks, to about 0.01
_MOST_EXACT = 16  # tasks whose shares are computed exactly, from all 2^16 sets of them
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

    def ignores_weights(self, num_tasks: int) -> str | None:
        """Returns why the mixing weights of `num_tasks` tasks have no effect on the shares of tasks
        in a batch; None if they have an effect."""
        return "the job has one task" if num_tasks == 1 else None

    def expected_shares(self, weights: np.ndarray) -> np.ndarray:
        """Returns the expected share of each task [K] in the examples.

        Subclasses compute it exactly; this estimates it from the first `SHARE_STEPS` steps.

        Args:
            weights: the mixing weights [K], as for `draw`.
        """
        draws = self._choices(tf.data.Dataset.range(SHARE_STEPS), weights)
        counts = [np.bincount(tasks, minlength=len(weights)) for tasks in draws.as_numpy_iterator()]
        return np.mean(counts, axis=0) / self.batch_size

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
        steps = tf.data.Dataset.range(np.iinfo(np.int64).max)
        choices = self._choices(steps, weights).unbatch()
        mixed = tf.data.Dataset.choose_from_datasets(streams, choices)
        return mixed.shard(self.num_hosts, self.host_index) if self.num_hosts > 1 else mixed

    def _choices(self, steps: tf.data.Dataset, weights: np.ndarray) -> tf.data.Dataset:
        """Returns what `draw` returns for each of `steps`."""
        return steps.map(
            tf.autograph.experimental.do_not_convert(lambda step: self.draw(step, weights))
        )

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

    def ignores_weights(self, num_tasks: int) -> str | None:
        if num_tasks == 2 and not self.replacement:
            return "with two tasks, StochasticTasks gives each of them half of every batch"
        return super().ignores_weights(num_tasks)

    def expected_shares(self, weights: np.ndarray) -> np.ndarray:
        if self.replacement:
            return weights / weights.sum()
        if len(weights) > _MOST_EXACT:
            return super().expected_shares(weights)
        counts = range(2, self._kappa(len(weights)) + 1)
        drawn = _chances_by_position(weights, counts[-1])
        shares = [self._quotas(count) @ drawn[:count] for count in counts]
        return np.mean(shares, axis=0) / self.batch_size

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

    def _quotas(self, count: int) -> np.ndarray:
        """Returns the numbers of examples [count] of the drawn tasks, in the order of drawing."""
        quota, rest = divmod(self.batch_size, count)
        return quota + (np.arange(count) < rest)

    def _kappa(self, num_tasks: int) -> int:
        return num_tasks if self.kappa is None else self.kappa


@dataclasses.dataclass(frozen=True)
class PerExample(Sampler):
    """Draws each example's task independently by mixing weight (the fixed-mixture ablation)."""

    def expected_shares(self, weights: np.ndarray) -> np.ndarray:
        return weights / weights.sum()

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

    def ignores_weights(self, num_tasks: int) -> str | None:
        return "EqualQuotas gives every task an equal share of every batch"

    def expected_shares(self, weights: np.ndarray) -> np.ndarray:
        return np.full(len(weights), 1 / len(weights))

    def draw(self, step: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
        del step
        return tf.repeat(tf.range(len(weights), dtype=tf.int64), self.batch_size // len(weights))


@dataclasses.dataclass(frozen=True)
class LastOfEach(Sampler):
    """Takes every example of a batch from the last task of each sequence, in equal parts. The K
    tasks are several sequences of equal length, one after another. Weights are ignored.

    A stage of a sequence trains only its newest task (`experiments.sequence`). The other tasks of a
    job have no examples, so `absent_tasks = 'hold'` leaves their rows unchanged.

    Attributes:
        sequences: the number of sequences.
    """

    sequences: int = 1

    def check(self, num_tasks: int) -> None:
        if self.sequences < 1 or num_tasks % self.sequences or self.batch_size % self.sequences:
            raise ValueError(
                f"LastOfEach.sequences is {self.sequences}, which must divide the number of tasks "
                f"({num_tasks}) and the batch size ({self.batch_size}). Correct SEQUENCES or "
                "BATCH_SIZE."
            )

    def ignores_weights(self, num_tasks: int) -> str | None:
        return "LastOfEach takes equal parts of every batch from the last task of each sequence"

    def expected_shares(self, weights: np.ndarray) -> np.ndarray:
        shares = np.zeros(len(weights))
        shares[self._last(len(weights))] = 1 / self.sequences
        return shares

    def draw(self, step: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
        del step
        last = tf.constant(self._last(len(weights)), tf.int64)
        return tf.repeat(last, self.batch_size // self.sequences)

    def _last(self, num_tasks: int) -> np.ndarray:
        length = num_tasks // self.sequences
        return np.arange(length - 1, num_tasks, length)


def _categorical(weights: np.ndarray, uniform: tf.Tensor) -> tf.Tensor:
    """Returns one index, drawn by `weights` [K], for each value of `uniform` from [0, 1)."""
    bounds = tf.constant(np.cumsum(weights)[:-1] / np.sum(weights))
    return tf.searchsorted(bounds, uniform, side="right")


def _chances_by_position(weights: np.ndarray, count: int) -> np.ndarray:
    """Returns the probability [count, K] that a task is the j-th of `count` tasks drawn without
    replacement by weight, summed over all sets of tasks drawn before it."""
    masks, tasks = np.arange(2 ** len(weights)), np.arange(len(weights))
    member = (masks[:, None] >> tasks & 1).astype(bool)
    left = weights.sum() - member @ weights
    sizes, reached = member.sum(1), np.eye(1, len(masks))[0]  # first, the empty set
    chances = np.zeros((count, len(weights)))
    for position in range(count):
        before = masks[sizes == position]
        each = np.where(member[before], 0, weights) * (reached[before] / left[before])[:, None]
        chances[position] = each.sum(0)
        np.add.at(reached, before[:, None] | 1 << tasks, each)
    return chances
