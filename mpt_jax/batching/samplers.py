"""Samplers, which choose the tasks in each batch.

A sampler draws the task of each of the B examples of a batch. The draws depend only on the seed and
the step and are made for the global batch, so all hosts agree on them.
"""

import dataclasses
import zlib

import numpy as np

from mpt_jax.batching import random_bits

SHARE_STEPS = 2000  # steps whose draws estimate the shares of tasks, to about 0.01
_MOST_EXACT = 16  # tasks whose shares are computed exactly, from all 2^16 sets of them
_DRAWS = zlib.crc32(b"mpt_jax.sampling") & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Base class of samplers. Subclasses implement `draw`.

    Attributes:
        batch_size: B, the number of examples (not packed rows) per step over all hosts.
        seed: seed of all draws, 0 .. 2^31 - 1.
        num_hosts: number of hosts that real T5X deals the batch to; must divide `batch_size`.
        host_index: index of this host, for real T5X.

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
        draws = self.draw(np.arange(SHARE_STEPS), weights)
        return np.bincount(draws.ravel(), minlength=len(weights)) / draws.size

    def draw(self, steps: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Returns the task indices of the examples of the global batch at each of `steps`.

        Args:
            steps: the steps.
            weights: the positive mixing weights of the tasks; they need not sum to 1.
        """
        raise NotImplementedError

    def _uniform(self, steps: np.ndarray, count: int) -> np.ndarray:
        """Returns `count` float64 values drawn uniformly from [0, 1) for each of `steps`."""
        return random_bits.uniform(self.seed, _DRAWS, steps, count)


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

    def draw(self, steps, weights):
        kappa, most = self._kappa(len(weights)), len(weights)
        uniform = self._uniform(steps, 2 + max(kappa, most))
        count = 2 + (uniform[:, :1] * (kappa - 1)).astype(np.int64)
        quota, rest = np.divmod(self.batch_size, count)
        place = np.arange(self.batch_size)
        if self.replacement:
            tasks = _categorical(weights, uniform[:, 2 : 2 + kappa])
            lucky = (uniform[:, 1:2] * count).astype(np.int64)
            before = np.minimum(place // quota, lucky)
            after = np.maximum(place - rest, 0) // quota
            drawn = np.maximum(before, after)
        else:
            scores = np.log(weights) - np.log(-np.log(uniform[:, 2 : 2 + most]))
            tasks = np.argsort(-scores, axis=1, kind="stable")
            longer = rest * (quota + 1)  # the examples of the tasks that supply one more
            drawn = np.where(place < longer, place // (quota + 1), rest + (place - longer) // quota)
        return np.take_along_axis(tasks, drawn, axis=1)

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

    def draw(self, steps, weights):
        return _categorical(weights, self._uniform(steps, self.batch_size))


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

    def draw(self, steps, weights):
        tasks = np.repeat(np.arange(len(weights)), self.batch_size // len(weights))
        return np.broadcast_to(tasks, (len(steps), len(tasks)))


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

    def draw(self, steps, weights):
        tasks = np.repeat(self._last(len(weights)), self.batch_size // self.sequences)
        return np.broadcast_to(tasks, (len(steps), len(tasks)))

    def _last(self, num_tasks: int) -> np.ndarray:
        length = num_tasks // self.sequences
        return np.arange(length - 1, num_tasks, length)


def _categorical(weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Returns one index, drawn by `weights` [K], for each value of `uniform` from [0, 1)."""
    bounds = np.cumsum(weights)[:-1] / np.sum(weights)
    return np.searchsorted(bounds, uniform, side="right")


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
